"""Measures the laps of one worker's steps, which are their parts, and passes them to sinks.

    attention worker   attention, dispatch, combine; sample      (its dispatcher)
    expert worker      receive, experts, send                    (its expert server)
    colocated worker   all of them; the experts' laps are within combine

``dispatch``, ``combine``, ``receive`` and ``send`` last one call; other laps are between calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from workers.metrics.captured_laps import CapturedLaps
from workers.model.config import BankSpec
from workers.requests.step_header import StepHeader


class TimingSink(Protocol):
    """Receives timings; ``StepTrace``, ``StepMetrics`` and ``StepSpans`` are sinks."""

    def fork(self) -> TimingSink:
        """Return a sink for steps that run between those of this one, with the same records."""

    def begin_step(self, header: StepHeader) -> bool:
        """Begin a step; returns whether the sink records its timings."""

    def add(self, name: str, start_ns: int, end_ns: int, labels: dict[str, Any]) -> None:
        """Add a timing (``time.monotonic_ns``). ``labels``: step, layer and other properties."""

    def flush(self) -> None:
        """End the step."""


class StepTimer:
    """Measures the laps of a worker's steps. If no sink records a step, laps read no clock."""

    def __init__(self, *sinks: TimingSink, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._all = sinks
        self._clock_ns = clock_ns
        self._sinks: tuple[TimingSink, ...] = ()
        self._header: StepHeader | None = None
        self._captured: CapturedLaps | None = None
        self._replayed: CapturedLaps | None = None
        self._begin_ns = 0
        self._last_ns = 0

    def begin_step(self, header: StepHeader) -> None:
        """Start a step and its first lap."""
        self._header = header
        self._captured = self._replayed = None
        self._sinks = tuple(sink for sink in self._all if sink.begin_step(header))
        self._begin_ns = self._last_ns = self._clock_ns()

    def restart(self) -> None:
        """Start the step and its first lap only now."""
        if self._sinks:
            self._begin_ns = self._last_ns = self._clock_ns()

    def capture(self, num_banks: int) -> CapturedLaps:
        """Return the laps until the next ``begin_step``, which are those of a captured step."""
        self._sinks = ()
        self._captured = CapturedLaps(num_banks)
        return self._captured

    @property
    def is_recording(self) -> bool:
        """Whether a sink records this step."""
        return bool(self._sinks)

    def mark(self, bank: BankSpec, now_ns: int | None = None) -> None:
        """Start a lap, now or at ``now_ns``, without recording the lap before it.

        ``bank``: the bank of the new lap.
        """
        if self._captured is not None:
            self._captured.mark(bank)
        if self._sinks:
            self._last_ns = self._clock_ns() if now_ns is None else now_ns

    def lap(self, name: str, bank: BankSpec, exchange: int, micro_batch: int) -> None:
        """End the current lap, which gets this name and exchange, and start the next one."""
        if self._captured is not None:
            self._captured.lap(name, bank, exchange, micro_batch)
        if self._sinks:
            self._end_lap(name, _place(bank, exchange, micro_batch), self._clock_ns())

    def add_laps(
        self, ends_ns: Mapping[str, int], bank: BankSpec, exchange: int, micro_batch: int
    ) -> None:
        """End successive laps of one exchange. ``ends_ns``: end by name (``time.monotonic_ns``)."""
        for name, end_ns in ends_ns.items() if self._sinks else ():
            self._end_lap(name, _place(bank, exchange, micro_batch), end_ns)

    def replay(self, laps: CapturedLaps) -> None:
        """Set the laps of the current step, which is a replay. ``end_step`` reads them, after the
        host has waited for the device."""
        self._replayed = laps

    def end_step(self, last: str = "") -> None:
        """End the step and its last lap, which gets the name ``last``; flush the sinks.

        A replay has no last lap, but the laps of one bank. Their label ``num_banks`` tells sinks
        that they stand for those of as many banks.
        """
        header, sinks = self._header, self._sinks
        if header is None or not sinks:
            return
        if self._replayed is not None:
            self._add_replayed(self._replayed)
        elif last:
            self._end_lap(last, {}, self._clock_ns())
        labels = {
            "step": header.step,
            "generation": header.generation,
            "micro_batches": header.num_micro_batches,
            "rows": {str(rank): grant.num_rows for rank, grant in header.grants},
        }
        for sink in sinks:
            sink.add("step", self._begin_ns, self._clock_ns(), labels)
            sink.flush()
        self._sinks = ()

    def _add_replayed(self, laps: CapturedLaps) -> None:
        for lap in laps.read():
            labels = _place(lap.bank, lap.exchange, lap.micro_batch)
            self._last_ns = self._begin_ns + lap.begin_ns
            more = {**labels, "num_banks": laps.num_banks}
            self._end_lap(lap.name, more, self._begin_ns + lap.end_ns)

    def _end_lap(self, name: str, labels: dict[str, Any], now_ns: int) -> None:
        assert self._header is not None, "begin_step must be called first"
        for sink in self._sinks:
            sink.add(name, self._last_ns, now_ns, {"step": self._header.step, **labels})
        self._last_ns = now_ns


def _place(bank: BankSpec, exchange: int, micro_batch: int) -> dict[str, Any]:
    names = {"layer": bank.layer, "bank": bank.bank}
    return {**names, "exchange": exchange, "micro_batch": micro_batch}
