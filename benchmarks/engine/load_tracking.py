"""Cost of tracking the experts' load: ``python -m benchmarks.engine.load_tracking``.

One process with one compute thread: CPU time to keep the routes, count them and write a report
every two seconds, divided by the CPU time of the steps. Both are measured in the same run, so that
other load on the machine does not matter.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.report.results import table
from benchmarks.serving.throughput import TINY, random_model
from cluster.config.cluster import EngineSection
from cluster.config.expert_load import LoadSection
from cluster.core.codec import Codec
from cluster.core.load_report import LoadReport
from cluster.launch.model_source import bundled_checkpoint
from workers.engine.expert_load import LoadCounter
from workers.requests.request import Request, SamplingParams

MOST_PERCENT = 1.0
"""Target: most CPU time of load tracking, in percent of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """CPU seconds of one run."""

    steps_s: float
    """CPU time of all steps, load tracking included."""
    num_steps: int
    """Number of steps."""
    tracking_s: float
    """CPU time to keep and count the routes."""
    report_s: float
    """CPU time to write one report."""

    @property
    def percent(self) -> float:
        """Load tracking in percent of the steps, with a report every ``LoadSection.report_s``."""
        reports = self.steps_s / LoadSection().report_s
        return 100 * (self.tracking_s + reports * self.report_s) / self.steps_s


def measure(checkpoint: Path, batch: int, new_tokens: int, prompt_tokens: int = 32) -> Cost:
    """Serve one batch and measure its load tracking."""
    section = EngineSection(kv_cache_bytes=256 << 20, max_num_seqs=64)
    engine = LocalEngine(checkpoint, section=section, num_threads=1)
    rng = random.Random(0)
    vocabulary = engine.config.vocab_size
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    def requests(name: str) -> list[Request]:
        return [
            Request(
                request_id=f"{name}{i}",
                prompt=tuple(rng.randrange(4, vocabulary) for _ in range(prompt_tokens)),
                params=params,
            )
            for i in range(batch)
        ]

    engine.run(requests("warm"))
    load = engine.engine.load
    load.flush()
    clock = _Clock()
    # ``add`` calls ``flush`` on the same thread: only the outer call is timed.
    for name in ("add", "flush"):
        setattr(load, name, clock.timed(getattr(load, name)))
    before = engine.engine.stats()["steps_total"]
    began = time.thread_time()
    engine.run(requests("run"))
    load.flush()
    steps_s = time.thread_time() - began
    num_steps = int(engine.engine.stats()["steps_total"] - before)
    return Cost(
        steps_s=steps_s, num_steps=num_steps, tracking_s=clock.total_s, report_s=_report_s(load)
    )


class _Clock:
    """CPU time of this thread in the timed calls."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._depth = 0

    def timed(self, call: Callable[..., None]) -> Callable[..., None]:
        @wraps(call)
        def run(*arguments: Any, **named: Any) -> None:
            began = time.thread_time()
            self._depth += 1
            try:
                call(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.total_s += time.thread_time() - began

        return run


def _report_s(load: LoadCounter) -> float:
    times = []
    codec: Codec[LoadReport] = Codec(LoadReport, "a load report")
    for _ in range(5):
        began = time.thread_time()
        codec.encode(load.report())
        times.append(time.thread_time() - began)
    return sorted(times)[2]


def section(quick: bool) -> str:
    """Return the Markdown section."""
    new_tokens = 8 if quick else 64
    batches = (2,) if quick else (1, 8, 32)
    model = TINY if quick else RandomModel()
    rows = []
    for batch in batches:
        rows.append(_row("bundled", batch, measure(bundled_checkpoint(), batch, new_tokens)))
    with random_model(model) as checkpoint:
        title = f"hidden {model.hidden}, {model.layers} layers"
        for batch in batches:
            rows.append(_row(title, batch, measure(checkpoint, batch, new_tokens)))
    head = ["model, batch", "step, ms", "tracking in a step, us", "report, us", "percent of a step"]
    return (
        "## Load tracking\n\n"
        "CPU time to keep and count the routes of committed steps, and to write a report every "
        f"{LoadSection().report_s:g} s, compared with the CPU time of the steps: one process with "
        f"one thread, prompts of 32 tokens, {new_tokens} new tokens each. Target: below "
        f"{MOST_PERCENT:g}%.\n\n"
        f"{table(head, rows)}"
    )


def _row(model: str, batch: int, cost: Cost) -> list[str]:
    return [
        f"{model}, {batch}",
        f"{cost.steps_s / cost.num_steps * 1e3:.2f}",
        f"{cost.tracking_s / cost.num_steps * 1e6:.1f}",
        f"{cost.report_s * 1e6:.0f}",
        f"{cost.percent:.2f}",
    ]


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
