"""Runs batches in the background.

All gateways with the same state folder look for batches in it. The gateway that locks the file of
responses of a batch runs the batch. If that gateway stops or dies, another one continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from starlette.routing import BaseRoute, Route

from cluster.batches.response_file import InUseError, ResponseFile
from cluster.disk.threads import END_S, DiskThreads
from gateway.batches.batch_store import BatchStore, PendingBatch, WorkPart
from gateway.batches.objects import ENDED
from gateway.batches.running import BatchTuning, RunningBatch, is_transient
from gateway.calls.gateway import Gateway
from gateway.core.errors import KeyFullError

logger = logging.getLogger(__name__)


_THREADS_A_BATCH = 2


class _Run(NamedTuple):
    tenant: str
    task: asyncio.Task[None]


class _Pause(NamedTuple):
    """Pause of a batch after an error, in seconds; ``ends_s`` is by ``time.monotonic``."""

    ends_s: float
    length_s: float


class BatchRunner:
    """Runs the batches of a gateway's state folder.

    Args:
        gateway: the replica.
        routes: routes of the public port.
        tuning: limits and intervals.
    """

    def __init__(
        self, gateway: Gateway, routes: Sequence[BaseRoute], tuning: BatchTuning | None = None
    ) -> None:
        self._gateway = gateway
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._tuning = tuning or BatchTuning()
        self._batches = BatchStore(gateway.state) if gateway.state is not None else None
        self._runs: dict[str, _Run] = {}
        self._pauses: dict[str, _Pause] = {}
        self._threads = DiskThreads(
            "the folder of batches", _THREADS_A_BATCH * self._tuning.max_batches, 0, math.inf
        )
        self._disk = self._threads.run_to_completion
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start looking for batches, if there is a state folder."""
        if self._batches is not None:
            self._task = asyncio.create_task(self._poll(self._batches))

    async def stop(self) -> None:
        """Stop running batches; other gateways continue them."""
        tasks = [*([self._task] if self._task else []), *(run.task for run in self._runs.values())]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=END_S)  # tasks do not end while the disk hangs

    async def _poll(self, batches: BatchStore) -> None:
        while True:
            try:
                await self._disk(batches.sweep)
                waiting = await self._disk(batches.waiting)
            except Exception as err:
                logger.error(
                    "could not read the pending batches: %s", err, exc_info=not is_transient(err)
                )
            else:
                self._take(batches, waiting)
            await asyncio.sleep(self._tuning.poll_s)

    def _take(self, batches: BatchStore, waiting: Sequence[PendingBatch]) -> None:
        """Run waiting batches, up to the limit of concurrent batches."""
        names = {work.batch_id for work in waiting}
        self._pauses = {name: one for name, one in self._pauses.items() if name in names}
        now_s = time.monotonic()
        for work in waiting:
            name = work.batch_id
            is_early = name in self._pauses and now_s < self._pauses[name].ends_s
            if name in self._runs or is_early or not self._has_free_slot(work.tenant):
                continue
            task = asyncio.create_task(self._run(batches, work))
            self._runs[name] = _Run(work.tenant, task)
            task.add_done_callback(partial(self._ended, name))

    def _ended(self, name: str, _: asyncio.Task[None]) -> None:
        del self._runs[name]

    def _has_free_slot(self, tenant: str) -> bool:
        """Whether a batch of ``tenant`` may run now. With API keys, the last of ``max_batches`` is
        reserved for tenants without a running batch."""
        num_left = self._tuning.max_batches - len(self._runs)
        is_seated = any(run.tenant == tenant for run in self._runs.values())
        return num_left > (is_seated and not self._gateway.keys.is_open)

    async def _run(self, batches: BatchStore, work: PendingBatch) -> None:
        try:
            await self._run_alone(batches, work)
        except Exception as err:
            self._pause(work.batch_id, err)
            is_bug = not is_transient(err)
            logger.error("batch %s is paused: %s", work.batch_id, err, exc_info=is_bug)

    def _pause(self, name: str, err: Exception) -> None:
        """Pause a batch, with exponential backoff unless its key's storage is full."""
        known = self._pauses.get(name)
        is_repeated = known is not None and not isinstance(err, KeyFullError)
        length_s = 2 * known.length_s if known is not None and is_repeated else self._tuning.retry_s
        length_s = min(length_s, self._tuning.max_retry_s)
        self._pauses[name] = _Pause(time.monotonic() + length_s, length_s)

    async def _run_alone(self, batches: BatchStore, work: PendingBatch) -> None:
        """Run a batch until it ends, unless another gateway runs it."""
        stack = contextlib.ExitStack()
        try:
            files = await self._disk(partial(_open, stack, batches, work.batch_id))
            batch = await self._disk(partial(batches.take, work))
            if batch is None:
                return
            if batch.status not in ENDED:
                disk = self._disk
                run = RunningBatch(self._gateway, batches, work.tenant, batch, *files, disk)
                await run.run(self._routes, self._tuning)
            await self._disk(partial(batches.end, work.batch_id))
        except InUseError:
            return
        finally:
            await self._disk(stack.close)


def _open(
    stack: contextlib.ExitStack, batches: BatchStore, batch_id: str
) -> tuple[ResponseFile, ResponseFile]:
    """Open the files of responses and failures. Raises the errors of ``ResponseFile``."""
    paths = (batches.path(batch_id, part) for part in (WorkPart.ANSWERS, WorkPart.FAILURES))
    answers, failures = (stack.enter_context(ResponseFile(path, is_private=True)) for path in paths)
    return answers, failures
