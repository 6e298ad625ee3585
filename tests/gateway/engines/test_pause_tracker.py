"""The pause of streams, from the times of their tokens."""

from __future__ import annotations

from gateway.engines.pause_tracker import PauseTracker


def test_the_longest_gap_around_a_change_is_reported() -> None:
    pauses = PauseTracker()
    pauses.change(1, 0.0)
    pauses.token(1.0, 1.5)
    assert pauses.take() is None  # nothing has changed
    assert pauses.change(2, 10.0)
    pauses.token(9.9, 10.4)
    pauses.token(9.75, 11.0)
    pauses.token(11.0, 15.0)  # has nothing to do with it
    assert pauses.take() == (2, 1.25)
    assert pauses.take() is None
    pauses.token(9.75, 20.0)  # a stream that waits longer
    assert pauses.take() == (2, 10.25)


def test_a_change_that_becomes_known_late_has_its_gaps() -> None:
    pauses = PauseTracker()
    pauses.change(1, 0.0)
    pauses.token(1.0, 4.0)
    pauses.token(9.0, 9.5)
    pauses.change(2, 10.0)
    assert pauses.take() == (2, 0.5)
    assert not pauses.change(2, 11.0)
    assert pauses.take() is None


def test_a_new_gateway_and_quick_tokens_have_nothing_to_report() -> None:
    pauses = PauseTracker()
    pauses.token(9.0, 9.5)
    assert not pauses.change(7, 10.0)
    assert pauses.take() is None
    pauses.change(8, 20.0)
    pauses.token(19.999, 20.01)
    assert pauses.take() is None
