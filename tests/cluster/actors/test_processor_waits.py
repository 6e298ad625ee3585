from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.harness.stalls import wait_until
from cluster.actors.processor_waits import ProcessorWaits

SPIN = [sys.executable, "-c", "while True: pass"]
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
NO_COUNTS = not Path("/proc/self/schedstat").exists()


@contextmanager
def running(command: list[str]) -> Iterator[int]:
    process = subprocess.Popen(command)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def write(proc: Path, pid: int, waits: dict[str, int], steal: int = 0) -> None:
    """The kernel's files for threads that have waited so many nanoseconds."""
    for thread, waited in waits.items():
        folder = proc / str(pid) / "task" / thread
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schedstat").write_text(f"5000 {waited} 3\n")
    (proc / "stat").write_text(f"cpu 1 1 1 1 1 1 1 9 0 0\ncpu0 1 1 1 1 1 1 1 {steal} 0 0\nctxt 5\n")


def test_the_thread_that_waited_longest_counts(tmp_path: Path) -> None:
    waits = ProcessorWaits(tmp_path)
    write(tmp_path, 7, {"7": 10**9, "8": 0})
    assert waits.take([7]) == {7: 0.0}, "nothing to compare with"
    write(tmp_path, 7, {"7": 10**9, "8": 5 * 10**8, "9": 10**12})
    assert waits.take([7]) == {7: 0.5}, "thread 9 is new"


def test_a_process_that_was_not_named_before_begins_again(tmp_path: Path) -> None:
    waits = ProcessorWaits(tmp_path)
    write(tmp_path, 7, {"7": 0})
    waits.take([7])
    waits.take([])
    write(tmp_path, 7, {"7": 10**9})
    assert waits.take([7]) == {7: 0.0}


def test_stolen_time_counts_for_processes_that_live(tmp_path: Path) -> None:
    waits = ProcessorWaits(tmp_path)
    write(tmp_path, 7, {"7": 0})
    waits.take([7, 8])
    write(tmp_path, 7, {"7": 0}, steal=os.sysconf("SC_CLK_TCK"))
    assert waits.take([7, 8]) == {7: 1.0, 8: 0.0}


def test_a_kernel_without_counts(tmp_path: Path) -> None:
    waits = ProcessorWaits(tmp_path)
    assert [waits.take([7]) for _ in range(2)] == [{7: 0.0}] * 2


@pytest.mark.skipif(NO_COUNTS, reason="this kernel does not count waits")
def test_starved_stopped_and_idle_processes() -> None:
    """More processes that spin than processors: each waits, but for one that is stopped."""
    waits, total = ProcessorWaits(), dict.fromkeys(("spin", "stopped", "idle"), 0.0)
    with ExitStack() as stack:
        pids = [stack.enter_context(running(SPIN)) for _ in range(4 * (os.cpu_count() or 1))]
        named = {pids[0]: "spin", pids[1]: "stopped", stack.enter_context(running(SLEEP)): "idle"}
        os.kill(pids[1], signal.SIGSTOP)

        def is_starved() -> bool:
            for pid, seconds in waits.take(named).items():
                total[named[pid]] += seconds
            return total["spin"] > 0.5

        wait_until(is_starved, "a process that waits for a processor")
    assert total["stopped"] < 0.25
