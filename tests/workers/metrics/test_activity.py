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


class Steps:
    """A data thread whose heartbeats, 0.5 s apart, tell for how long its step has stalled."""

    def __init__(self) -> None:
        self.now = 100.0
        self.activity = Activity()

    def beat(self) -> float | None:
        self.now += 0.5
        self.activity.observe(self.now)
        return self.activity.stalled_s


def test_a_step_that_is_wanted_and_does_not_come_stalls_though_the_loop_turns() -> None:
    steps = Steps()
    assert steps.beat() is None
    steps.activity.wants_rows = True
    seen = []
    for _ in range(4):
        steps.activity.begin_iteration()
        seen.append(steps.beat())
    assert seen == [0.0, 0.5, 1.0, 1.5]
    steps.activity.advance()  # it has committed
    assert steps.beat() == 0.0
    steps.activity.wants_rows = False
    assert steps.beat() is None


def test_exchanges_and_computing_in_a_step_are_progress() -> None:
    steps, cpu_s = Steps(), 0.0
    steps.activity.cpu_s = lambda: cpu_s
    steps.activity.rows = 64
    assert steps.beat() == 0.0
    for _ in range(4):
        with steps.activity:
            pass
        assert steps.beat() == 0.0
    for _ in range(4):
        cpu_s += 0.1
        assert steps.beat() == 0.0
    assert [steps.beat(), steps.beat()] == [0.5, 1.0]
    steps.activity.native_progress.value += 1
    assert steps.beat() == 0.0


def test_a_turn_ends_the_step() -> None:
    steps = Steps()
    steps.activity.rows = 8
    assert steps.beat() == 0.0
    steps.activity.begin_iteration()
    assert steps.beat() is None
