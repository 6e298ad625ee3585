"""``cluster.disk.threads``."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cluster.disk.threads import DiskThreads
from tests.paths import ROOT

LIMIT_S = 60.0


class HungDisk:
    """Calls of it do not end until ``answer`` is set."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.has_begun = threading.Semaphore(0)
        self.num_ended = 0

    def call(self) -> str:
        self.has_begun.release()
        assert self.answer.wait(LIMIT_S)
        self.num_ended += 1
        return "done"


def with_hung_disk(work: Callable[[HungDisk], Coroutine[Any, Any, None]]) -> None:
    disk = HungDisk()

    async def run() -> None:
        async with asyncio.timeout(LIMIT_S):
            await work(disk)

    try:
        asyncio.run(run())
    finally:
        disk.answer.set()


async def refusal(threads: DiskThreads, disk: HungDisk) -> str:
    with pytest.raises(TimeoutError) as caught:
        await threads.run(disk.call)
    return str(caught.value)


def test_results_and_errors_are_those_of_the_call() -> None:
    threads = DiskThreads("the disk", 2, 2, LIMIT_S)

    def fail() -> None:
        raise TimeoutError("of the disk itself")

    async def work() -> None:
        assert await threads.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(TimeoutError, match="of the disk itself"):
            await threads.run(fail)
        assert await threads.run_to_completion(threading.get_ident) != threading.get_ident()

    asyncio.run(work())


def test_calls_of_a_disk_that_hangs_fail_at_their_limit_and_then_at_once() -> None:
    async def work(disk: HungDisk) -> None:
        threads = DiskThreads("the disk", 2, 8, 0.05)
        first = await asyncio.gather(*(refusal(threads, disk) for _ in range(5)))
        assert set(first) == {"the disk has not answered for 0.05 s"}
        text = "the disk does not answer: 2 calls have waited for more than 0.05 s"
        assert await refusal(threads, disk) == text
        disk.answer.set()
        while any(job.is_running for job in threads._late):
            await asyncio.sleep(0)
        assert await threads.run(disk.call) == "done"
        assert disk.num_ended == 3, "calls whose time was over before a thread had them never ran"

    with_hung_disk(work)


def test_few_calls_wait_for_a_slow_disk() -> None:
    async def work(disk: HungDisk) -> None:
        threads = DiskThreads("the disk", 1, 2, LIMIT_S)
        tasks = [asyncio.create_task(threads.run(disk.call)) for _ in range(3)]
        await asyncio.to_thread(disk.has_begun.acquire)
        assert await refusal(threads, disk) == "the disk is too slow: 2 calls wait for it"
        disk.answer.set()
        assert await asyncio.gather(*tasks) == ["done"] * 3

    with_hung_disk(work)


def test_a_cancelled_call_does_not_begin_and_a_running_one_is_waited_for() -> None:
    async def work(disk: HungDisk) -> None:
        threads = DiskThreads("the disk", 1, 8, LIMIT_S)
        running = asyncio.create_task(threads.run_to_completion(disk.call))
        await asyncio.to_thread(disk.has_begun.acquire)
        waiting = asyncio.create_task(threads.run(disk.call))
        await asyncio.sleep(0)
        for task in (waiting, running):
            task.cancel()
        await asyncio.wait([waiting])
        assert not running.done()
        disk.answer.set()
        await asyncio.wait([running])
        assert running.cancelled()
        assert await threads.run(lambda: disk.num_ended) == 1

    with_hung_disk(work)


HANGS = """
import asyncio, time
from cluster.disk.threads import DiskThreads
async def work():
    try:
        await DiskThreads("the disk", 1, 1, 0.05).run(time.sleep, 3600)
    except TimeoutError:
        print("ended")
asyncio.run(work())
"""


def test_a_call_that_never_ends_does_not_keep_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


class Opened:
    """Something that is to be closed."""

    def __init__(self) -> None:
        self.closed_by: threading.Thread | None = None
        self.is_closed = threading.Event()

    def close(self) -> None:
        self.closed_by = threading.current_thread()
        self.is_closed.set()


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_comes_when_its_caller_has_gone_is_released(is_cancelled: bool) -> None:
    """By a thread of the disk, as closing may wait for the disk too."""
    opened = Opened()

    async def work(disk: HungDisk) -> None:
        threads = DiskThreads("the disk", 2, 2, LIMIT_S if is_cancelled else 0.01)

        def open_it() -> Opened:
            disk.call()
            return opened

        asked = asyncio.create_task(threads.run(open_it, release=Opened.close))
        await asyncio.to_thread(disk.has_begun.acquire)
        if is_cancelled:
            asked.cancel()
        with pytest.raises(asyncio.CancelledError if is_cancelled else TimeoutError):
            await asked
        assert not opened.is_closed.is_set()
        disk.answer.set()
        assert await asyncio.to_thread(opened.is_closed.wait, LIMIT_S)

    with_hung_disk(work)
    assert opened.closed_by is not None
    assert opened.closed_by.name == "the disk"


def test_what_its_caller_has_got_is_not_released() -> None:
    async def work() -> Opened:
        threads = DiskThreads("the disk", 2, 2, LIMIT_S)
        return await threads.run(Opened, release=Opened.close)

    assert not asyncio.run(work()).is_closed.is_set()
