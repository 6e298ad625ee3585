"""Histograms of the times of a worker's laps; one step in ``SAMPLE_INTERVAL`` is measured.

All workers measure the same steps, with ``workers.metrics.step_timer``.
"""

from __future__ import annotations

from typing import Any

from workers.metrics.histogram import Histogram
from workers.requests.step_header import StepHeader

SAMPLE_INTERVAL = 8
"""One step in this many is measured."""
BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Upper bounds of buckets in seconds."""
HISTOGRAMS = {
    "attention": "attention_compute_seconds",
    "dispatch": "dispatch_seconds",
    "combine": "combine_seconds",
    "experts": "expert_compute_seconds",
}
"""Names of the histograms by lap; all have the label ``phase``."""
BUBBLE = "bubble_seconds"
"""Name of the histogram of waits for other workers, which also has the label ``phase``."""


def is_measured(header: StepHeader) -> bool:
    """Whether a step is measured, on all workers."""
    return header.step % SAMPLE_INTERVAL == 0


class StepMetrics:
    """``TimingSink`` with histograms. The data thread writes, any thread reads.

    Args:
        wait: name of the laps in which the worker waits for others, which form the step's bubble;
            None without other workers.
    """

    def __init__(self, wait: str | None) -> None:
        self._wait = wait
        self._found: dict[tuple[str, str], Histogram] = {}
        """Histograms by name and phase, which all forks share."""
        self._phase = ""
        self._bubble_ns = 0

    def fork(self) -> StepMetrics:
        other = StepMetrics(self._wait)
        other._found = self._found
        return other

    def begin_step(self, header: StepHeader) -> bool:
        self._phase = "prefill" if header.prefill_rows else "decode"
        self._bubble_ns = 0
        return is_measured(header)

    def add(self, name: str, start_ns: int, end_ns: int, labels: dict[str, Any]) -> None:
        if name in HISTOGRAMS:
            self._observe(HISTOGRAMS[name], end_ns - start_ns)
        if name == self._wait:
            # On a GPU, the laps of one bank stand for those of all.
            self._bubble_ns += (end_ns - start_ns) * labels.get("num_banks", 1)

    def flush(self) -> None:
        if self._wait:
            self._observe(BUBBLE, self._bubble_ns)

    def stats(self) -> dict[str, float]:
        """All histograms as flat entries for the worker's table of stats."""
        return {
            key: value
            for (name, phase), histogram in tuple(self._found.items())
            for key, value in histogram.stats(name, f'phase="{phase}"').items()
        }

    def _observe(self, name: str, time_ns: int) -> None:
        key = (name, self._phase)
        if key not in self._found:
            self._found[key] = Histogram(BUCKETS)
        self._found[key].observe(time_ns / 1e9)
