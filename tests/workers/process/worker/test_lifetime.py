"""The life of a worker's process goes one way."""

import pytest

from workers.process.worker import lifetime
from workers.process.worker.lifetime import Lifetime


def test_a_worker_asks_for_a_drain_once() -> None:
    life = Lifetime()
    assert [life.begin_leaving(), life.begin_leaving()] == [True, False]
    assert not life.is_ending


def test_a_worker_that_ends_asks_for_no_drain() -> None:
    life = Lifetime()
    life.end()
    assert not life.begin_leaving()
    assert life.is_ending


def test_a_worker_may_be_told_to_end_again() -> None:
    """By the controller's frame and by a call of Ray."""
    life = Lifetime()
    life.begin_leaving()
    life.end()
    life.end()
    assert life.is_ending


def test_who_is_told_to_end_waits_for_the_one_who_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have died: then the worker ends by itself."""
    monkeypatch.setattr(lifetime, "_CALL_LIMIT_S", 0.01)
    alone, followed = Lifetime(), Lifetime()
    alone.end()
    assert not alone.is_stopped_in_time()
    followed.end()
    followed.stop()
    assert followed.is_stopped_in_time()
