"""Runs batches, beside the requests that somebody waits for.

All gateways with the same state folder look for batches there. One of them runs each: the one that
has its file of answers open. When it ends or dies, another one goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from starlette.routing import BaseRoute, Route

from cluster.batches.answers import AnswerFile, InUseError
from cluster.core.errors import ConflictError
from gateway.batches.objects import ENDED
from gateway.batches.running import BatchTuning, RunningBatch, damage, is_passing, moved
from gateway.batches.shelf import BatchShelf, Work
from gateway.generation.gateway import Gateway

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class _Run(NamedTuple):
    tenant: str
    task: asyncio.Task[None]


class BatchRunner:
    """Runs the batches of a gateway's state folder.

    Args:
        gateway: it answers.
        routes: the routes of the public port.
        tuning: how.
    """

    def __init__(
        self, gateway: Gateway, routes: Sequence[BaseRoute], tuning: BatchTuning | None = None
    ) -> None:
        self._gateway = gateway
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._tuning = tuning or BatchTuning()
        self._shelf = BatchShelf(gateway.state) if gateway.state is not None else None
        self._runs: dict[str, _Run] = {}
        self._again_s: dict[str, float] = {}  # of batches that stand still: when to try again
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for batches; does nothing without a state folder."""
        if self._shelf is not None:
            self._task = asyncio.create_task(self._look(self._shelf))

    async def stop(self) -> None:
        """End; other gateways go on with what runs here."""
        tasks = [*([self._task] if self._task else []), *(run.task for run in self._runs.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self, shelf: BatchShelf) -> None:
        while True:
            try:
                await asyncio.to_thread(shelf.sweep)
                waiting = await asyncio.to_thread(shelf.waiting)
            except Exception as err:
                logger.error("batches cannot be looked for: %s", err, exc_info=not is_passing(err))
            else:
                self._take(shelf, waiting)
            await asyncio.sleep(self._tuning.look_s)

    def _take(self, shelf: BatchShelf, waiting: Sequence[Work]) -> None:
        """Run those batches that do not run here already, as far as there are seats."""
        names = {work.batch_id for work in waiting}
        self._again_s = {name: at for name, at in self._again_s.items() if name in names}
        now_s = time.monotonic()
        for work in waiting:
            name = work.batch_id
            is_early = now_s < self._again_s.get(name, now_s)
            if name in self._runs or is_early or not self._has_seat(work.tenant):
                continue
            task = asyncio.create_task(self._run(shelf, work))
            self._runs[name] = _Run(work.tenant, task)
            task.add_done_callback(partial(self._ended, name))

    def _ended(self, name: str, _: asyncio.Task[None]) -> None:
        del self._runs[name]

    def _has_seat(self, tenant: str) -> bool:
        """The last seat is for a key without one, however many batches another key has."""
        num_left = self._tuning.max_batches - len(self._runs)
        is_seated = any(run.tenant == tenant for run in self._runs.values())
        return num_left > (is_seated and not self._gateway.keys.is_open)

    async def _run(self, shelf: BatchShelf, work: Work) -> None:
        try:
            await self._run_alone(shelf, work)
        except Exception as err:
            self._again_s[work.batch_id] = time.monotonic() + self._tuning.retry_s
            is_bug = not is_passing(err)
            logger.error("batch %s stands still: %s", work.batch_id, err, exc_info=is_bug)

    async def _run_alone(self, shelf: BatchShelf, work: Work) -> None:
        """Run a batch to its end, unless another gateway does."""
        with contextlib.ExitStack() as stack:
            try:
                files = await _to_its_end(asyncio.to_thread(_open, stack, shelf, work.batch_id))
            except InUseError:
                return
            except ConflictError as err:
                await asyncio.to_thread(_fail, shelf, work, err)
                return
            batch = None
            if shelf.is_waiting(work.batch_id):  # else it has just ended elsewhere
                batch = await asyncio.to_thread(shelf.get, work.tenant, work.batch_id)
                if batch is None and shelf.is_new(work.batch_id):
                    return  # it is being made
            if batch is not None and batch.status not in ENDED:
                run = RunningBatch(self._gateway, shelf, work.tenant, batch, *files)
                await run.run(self._routes, self._tuning)
            await asyncio.to_thread(shelf.end, work.batch_id)


def _open(
    stack: contextlib.ExitStack, shelf: BatchShelf, batch_id: str
) -> tuple[AnswerFile, AnswerFile]:
    """The files of answers and of failures. Raises what ``AnswerFile`` raises."""
    answers = stack.enter_context(AnswerFile(shelf.answers(batch_id)))
    return answers, stack.enter_context(AnswerFile(shelf.failures(batch_id)))


def _fail(shelf: BatchShelf, work: Work, error: ConflictError) -> None:
    """End a batch whose answers so far cannot be read."""
    batch = shelf.get(work.tenant, work.batch_id)
    if batch is not None and batch.status not in ENDED:
        shelf.save(work.tenant, moved(batch, "failed", errors=[damage(error)]))
    shelf.end(work.batch_id)


async def _to_its_end(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of work that goes on when this is cancelled: it is waited for even then."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
