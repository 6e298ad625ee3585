"""Laps of a captured step, on a clock of the device that advances with each event."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from benchmarks.harness.mesh import make_bank
from tests.workers.metrics.test_step_metrics import header_of
from tests.workers.metrics.test_step_timer import Kept
from workers.metrics.step_timer import StepTimer

NUM_BANKS = 4
TIMED = 2
SECOND = 10**9


class Event:
    """An event whose time is its number, in milliseconds."""

    numbers = count()

    def __init__(self, enable_timing: bool, external: bool) -> None:
        assert enable_timing
        assert external, "within a graph it would only order the stream"

    def record(self) -> None:
        self.at = next(self.numbers)

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


@pytest.fixture(autouse=True)
def _events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "numbers", count())


def attention_laps(timer: StepTimer) -> None:
    """Those of an attention rank with one micro-batch."""
    for index in range(NUM_BANKS):
        bank = make_bank(index)
        timer.lap("attention", bank, 0, 0)
        timer.lap("dispatch", bank, 0, 0)
        timer.mark(bank)
        timer.lap("combine", bank, 0, 0)


def test_the_laps_of_the_bank_in_the_middle_are_timed() -> None:
    sink = Kept()
    timer = StepTimer(sink, clock_ns=lambda: SECOND)
    timer.begin_step(header_of(4))
    laps = timer.capture(NUM_BANKS)
    attention_laps(timer)
    # The start, three laps of the bank before, then attention, dispatch, the mark and combine.
    assert next(Event.numbers) == 1 + 3 + 4
    timer.begin_step(header_of(8))
    timer.replay(laps)
    timer.end_step("sample")
    bank = make_bank(TIMED)
    labels = {"step": 8, "layer": bank.layer, "bank": bank.bank, "exchange": 0, "micro_batch": 0}
    *timings, whole = sink.timings
    assert whole[0] == "step"
    assert timings == [
        (name, SECOND + begin * 10**6, SECOND + end * 10**6, {**labels, "num_banks": NUM_BANKS})
        for name, begin, end in (("attention", 3, 4), ("dispatch", 4, 5), ("combine", 6, 7))
    ]


def test_events_are_read_only_if_a_sink_takes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Kept()
    timer = StepTimer(sink)
    timer.begin_step(header_of(4))
    laps = timer.capture(NUM_BANKS)
    attention_laps(timer)
    monkeypatch.delattr(Event, "elapsed_time")
    timer.begin_step(header_of(5))
    timer.replay(laps)
    timer.end_step("sample")
    assert sink.timings == []


def test_laps_of_a_replay_that_failed_are_dropped() -> None:
    sink = Kept()
    timer = StepTimer(sink)
    timer.begin_step(header_of(4))
    laps = timer.capture(NUM_BANKS)
    attention_laps(timer)
    timer.begin_step(header_of(8))
    timer.replay(laps)
    timer.begin_step(header_of(8))
    timer.end_step("sample")
    assert [name for name, *_ in sink.timings] == ["sample", "step"]


def test_one_bank_has_laps_from_its_first_mark_on() -> None:
    sink = Kept()
    timer = StepTimer(sink)
    timer.begin_step(header_of(4))
    laps = timer.capture(1)
    bank = make_bank(0)
    timer.lap("attention", bank, 0, 0)
    timer.lap("dispatch", bank, 0, 0)
    assert [lap.name for lap in laps.read()] == ["dispatch"]


def test_laps_of_a_capture_are_not_of_its_step() -> None:
    sink = Kept()
    timer = StepTimer(sink)
    timer.begin_step(header_of(4))
    timer.capture(num_banks=9)
    timer.lap("attention", make_bank(0), 0, 0)
    assert not timer.is_recording
    timer.begin_step(header_of(6))
    timer.lap("attention", make_bank(0), 0, 0)
    assert [place["step"] for *_, place in sink.timings] == [6]
