"""Sequences past their deadline are found once, in order, and ended ones are forgotten."""

from __future__ import annotations

import math
import random

from workers.engine.deadlines import Deadlines
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState, SequenceStatus


def sequence(deadline: float) -> SequenceState:
    request = Request(request_id="r", prompt=(1,), params=SamplingParams())
    return SequenceState(request=request, choice=0, arrival=0, deadline=deadline)


def test_late_sequences_are_found_once_in_the_order_of_their_deadlines() -> None:
    deadlines = Deadlines()
    later, first, second, never = (sequence(d) for d in (5.0, 3.0, 3.0, math.inf))
    for each in (later, first, second, never):
        deadlines.add(each)
    assert deadlines.take_late(2.9) == []
    assert deadlines.take_late(3.0) == [first, second]
    assert deadlines.take_late(4.9) == []
    assert deadlines.take_late(math.inf) == [later]


def test_a_sequence_that_has_ended_is_not_late() -> None:
    deadlines = Deadlines()
    ended, running = sequence(1.0), sequence(2.0)
    deadlines.add(ended)
    deadlines.add(running)
    ended.status = SequenceStatus.FINISHED
    assert deadlines.take_late(9.0) == [running]


def test_ended_sequences_do_not_pile_up() -> None:
    deadlines, rng = Deadlines(), random.Random(0)
    open_ones = [sequence(100.0 + i) for i in range(300)]
    for each in open_ones:
        deadlines.add(each)
    for _ in range(5000):
        ended = sequence(rng.uniform(200.0, 300.0))
        deadlines.add(ended)
        ended.status = SequenceStatus.FINISHED
    assert len(deadlines) <= 2 * (len(open_ones) + 1)
    assert deadlines.take_late(1000.0) == open_ones
