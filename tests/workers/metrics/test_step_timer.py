"""Laps of a step: what sinks get, and that a step without a sink costs nothing."""

from __future__ import annotations

from itertools import count
from typing import Any

from benchmarks.harness.mesh import make_bank
from tests.workers.metrics.test_step_metrics import header_of
from workers.metrics.step_timer import StepTimer
from workers.requests.step_header import StepHeader


class Kept:
    """A sink of every second step."""

    def __init__(self) -> None:
        self.timings: list[tuple[str, int, int, dict[str, Any]]] = []
        self.num_flushed = 0

    def fork(self) -> Kept:
        return self

    def begin_step(self, header: StepHeader) -> bool:
        return header.step % 2 == 0

    def add(self, name: str, start_ns: int, end_ns: int, place: dict[str, Any]) -> None:
        self.timings.append((name, start_ns, end_ns, place))

    def flush(self) -> None:
        self.num_flushed += 1


def test_laps_follow_one_another_but_for_marks() -> None:
    sink = Kept()
    timer = StepTimer(sink, clock_ns=count(1).__next__)
    bank = make_bank(3)
    timer.begin_step(header_of(4))
    timer.lap("attention", bank, 0, 1)
    timer.mark(bank)
    timer.lap("combine", bank, 0, 1)
    timer.end_step("sample")
    place = {"step": 4, "layer": bank.layer, "bank": bank.bank, "exchange": 0, "micro_batch": 1}
    assert sink.timings == [
        ("attention", 1, 2, place),
        ("combine", 3, 4, place),
        ("sample", 4, 5, {"step": 4}),
        ("step", 1, 6, {"step": 4, "generation": 1, "micro_batches": 1, "rows": {"0": 1}}),
    ]
    assert sink.num_flushed == 1
    timer.end_step()  # nothing has begun since
    assert sink.num_flushed == 1


def test_a_step_that_no_sink_takes_reads_no_clock() -> None:
    sink, clock = Kept(), count(1)
    timer = StepTimer(sink, clock_ns=clock.__next__)
    timer.begin_step(header_of(5))
    begun = next(clock)
    timer.lap("attention", make_bank(0), 0, 0)
    timer.mark(make_bank(0))
    timer.end_step("sample")
    assert (next(clock) - 1, sink.timings, sink.num_flushed) == (begun, [], 0)
