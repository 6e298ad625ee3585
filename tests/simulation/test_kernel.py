"""Threads of simulated processes: when they run, and what their ends do."""

from __future__ import annotations

import pytest

from tests.simulation.kernel import Fiber, Kernel, Process

LASTS_S = 10.0


@pytest.fixture
def kernel() -> Kernel:
    return Kernel(0)


@pytest.fixture
def process(kernel: Kernel) -> Process:
    return Process(kernel, "worker", "host", 1)


def test_the_end_of_a_thread_resumes_no_other(kernel: Kernel, process: Process) -> None:
    """Neither the one that started it, nor, where that has ended, the one before it."""
    found = list[tuple[str, float, bool]]()

    def note(name: str, lasts_s: float) -> None:
        began = kernel.now
        woken = kernel.this_fiber().park(lasts_s)
        found.append((name, round(kernel.now - began, 6), woken))

    def start(*names: str, lasts_s: float) -> None:
        if len(names) > 1:
            Fiber(process, lambda: start(*names[1:], lasts_s=lasts_s / 2), names[1]).start()
        note(names[0], lasts_s)

    Fiber(process, lambda: start("first", "second", "third", lasts_s=LASTS_S), "first").start()
    kernel.run(kernel.now + 2 * LASTS_S)
    assert found == [
        ("third", LASTS_S / 4, False),
        ("second", LASTS_S / 2, False),
        ("first", LASTS_S, False),
    ]
    assert (kernel.process, kernel.fiber, kernel.failures) == (None, None, [])


def test_a_thread_outlives_the_one_that_started_it(kernel: Kernel, process: Process) -> None:
    ended = list[str]()

    def child() -> None:
        kernel.sleep(LASTS_S)
        ended.append("child")

    def starter() -> None:
        Fiber(process, child, "child").start()
        kernel.sleep(LASTS_S / 2)
        ended.append("starter")

    Fiber(process, starter, "starter").start()
    kernel.run(kernel.now + 2 * LASTS_S)
    assert ended == ["starter", "child"]


def test_the_end_of_a_simulation_unwinds_every_thread(kernel: Kernel, process: Process) -> None:
    unwound = list[str]()

    def wait(name: str, *more: str) -> None:
        try:
            if more:
                Fiber(process, lambda: wait(*more), more[0]).start()
            kernel.this_fiber().park()
        finally:
            unwound.append(name)

    Fiber(process, lambda: wait("first", "second", "third"), "first").start()
    kernel.run(kernel.now + LASTS_S)
    kernel.close()
    assert sorted(unwound) == ["first", "second", "third"]
