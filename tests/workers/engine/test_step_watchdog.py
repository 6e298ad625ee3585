"""When a rank has waited too long for a step; times are passed in."""

from __future__ import annotations

from workers.engine.step_watchdog import StepWatchdog
from workers.metrics.activity import ROW_LIMIT_S


def overdue(
    watchdog: StepWatchdog,
    now: float,
    *,
    last_rows: int = 0,
    last_commit: float = 0.0,
    wants: bool = True,
    depth: int = 0,
) -> bool:
    found = watchdog.overdue_s(
        wants=wants, depth=depth, last_rows=last_rows, last_commit=last_commit, now=now
    )
    return found is not None


def test_a_rank_waits_longer_the_further_it_is_from_the_leader() -> None:
    for depth, limit_s in ((0, 4.0), (1, 8.0), (2, 12.0)):
        watchdog = StepWatchdog(2.0)
        assert not overdue(watchdog, 100.0, depth=depth)
        assert not overdue(watchdog, 100.0 + limit_s, depth=depth)
        assert overdue(watchdog, 100.1 + limit_s, depth=depth)


def test_rows_of_the_step_before_may_still_be_computed() -> None:
    watchdog = StepWatchdog(2.0)
    more_s = 512 * ROW_LIMIT_S
    assert not overdue(watchdog, 100.0, last_rows=512)
    assert not overdue(watchdog, 104.0 + more_s, last_rows=512)
    assert overdue(watchdog, 104.1 + more_s, last_rows=512)


def test_a_commit_begins_the_time_again() -> None:
    watchdog = StepWatchdog(2.0)
    assert not overdue(watchdog, 100.0)
    assert not overdue(watchdog, 110.0, last_commit=107.0)
    assert overdue(watchdog, 111.1, last_commit=107.0)


def test_an_idle_rank_waits_for_nothing() -> None:
    watchdog = StepWatchdog(2.0)
    assert not overdue(watchdog, 100.0, wants=False)
    assert not overdue(watchdog, 200.0)
    assert not overdue(watchdog, 204.0)
    assert overdue(watchdog, 204.1)
    watchdog.begin()
    assert not overdue(watchdog, 300.0)
