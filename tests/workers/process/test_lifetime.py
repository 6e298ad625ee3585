"""The life of a worker's process goes one way."""

from workers.process.lifetime import Lifetime


def test_a_worker_asks_for_a_drain_once() -> None:
    lifetime = Lifetime()
    assert [lifetime.leave(), lifetime.leave()] == [True, False]
    assert not lifetime.is_ending


def test_a_worker_that_ends_asks_for_no_drain() -> None:
    lifetime = Lifetime()
    lifetime.end()
    assert not lifetime.leave()
    assert lifetime.is_ending


def test_a_worker_may_be_told_to_end_again() -> None:
    """By the controller's frame and by a call of Ray."""
    lifetime = Lifetime()
    lifetime.leave()
    lifetime.end()
    lifetime.end()
    assert lifetime.is_ending
