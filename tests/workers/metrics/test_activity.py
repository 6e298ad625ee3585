"""Progress of a data thread as heartbeats report it; clocks are set by hand."""

from __future__ import annotations

import threading

from workers.metrics.activity import ROW_LIMIT_S, Activity, thread_cpu_clock


class Thread:
    """A data thread that uses CPU time when it is told to."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.now = 100.0
        self.activity = Activity()
        self.activity.cpu_s = lambda: self.cpu_s
        self.activity.observe(self.now)

    def progresses(self, *, cpu_s: float) -> bool:
        """Whether a heartbeat shows progress after half a second with this CPU time."""
        before = self.activity.observe(self.now)
        self.now += 0.5
        self.cpu_s += cpu_s
        return self.activity.observe(self.now) > before


def test_a_long_exchange_makes_progress_while_it_computes() -> None:
    thread = Thread()
    thread.activity.rows = 64
    assert [thread.progresses(cpu_s=0.02) for _ in range(30)] == [True] * 30  # 15 s
    assert not thread.progresses(cpu_s=0.0)  # it hangs


def test_the_time_for_computing_grows_with_the_rows_and_ends() -> None:
    thread = Thread()
    thread.activity.rows = round(1.0 / ROW_LIMIT_S)
    assert [thread.progresses(cpu_s=0.5) for _ in range(4)] == [True, True, False, False]
    thread.activity.advance()  # the next exchange
    assert thread.progresses(cpu_s=0.5)


def test_outside_a_step_only_counted_progress_is_progress() -> None:
    assert not Thread().progresses(cpu_s=0.5)


def test_a_thread_is_bound_to_its_own_clock_and_may_end() -> None:
    activity = Activity()

    def begin() -> None:
        activity.cpu_s = thread_cpu_clock()

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    activity.rows = 1
    assert activity.observe(1.0) == activity.observe(1.1) == 0
