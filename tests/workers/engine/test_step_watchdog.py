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
    **is_so: bool,
) -> bool:
    facts = {"wants": True, "leads": True} | is_so
    found = watchdog.overdue_s(last_rows=last_rows, last_commit=last_commit, now=now, **facts)
    return found is not None


def test_the_leader_waits_for_two_limits_and_the_others_for_four() -> None:
    for leads, limit_s in ((True, 4.0), (False, 8.0)):
        watchdog = StepWatchdog(2.0)
        assert not overdue(watchdog, 100.0, leads=leads)
        assert not overdue(watchdog, 100.0 + limit_s, leads=leads)
        assert overdue(watchdog, 100.1 + limit_s, leads=leads)


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
