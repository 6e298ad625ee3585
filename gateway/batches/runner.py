"""Runs batches, beside the requests that somebody waits for.

All gateways with the same state folder look for batches there. One of them runs each: the one that
has its file of answers open. When it ends or dies, another one goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.routing import BaseRoute, Route

from cluster.batches.answers import AnswerFile
from cluster.batches.requests import BatchLimits, BatchRequest, RequestFile
from cluster.batches.run import BatchAnswer, BatchRun, UnreachableError
from cluster.core.errors import ConflictError, RequestError
from gateway.auth.key_limits import Account
from gateway.batches.inner_calls import InnerCalls
from gateway.batches.objects import Batch, BatchProblem, BatchStatus, RequestCounts
from gateway.batches.shelf import BatchShelf, Work
from gateway.core.errors import StorageError, StorageFullError
from gateway.generation.gateway import Gateway

logger = logging.getLogger(__name__)

_NEVER_S = float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTuning:
    """How batches are run."""

    look_s: float = 2.0
    """Interval at which a gateway looks for batches and for orders to end one."""
    max_batches: int = 4
    """Batches that a gateway runs at a time."""
    concurrency: int = 64
    """Requests of a batch that run at a time."""
    priority: int = 1
    """Of requests that name none: after those of others."""


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
        self._running: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for batches; does nothing without a state folder."""
        if self._shelf is not None:
            self._task = asyncio.create_task(self._look(self._shelf))

    async def stop(self) -> None:
        """End; other gateways go on with what runs here."""
        tasks = [*([self._task] if self._task else []), *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self, shelf: BatchShelf) -> None:
        while True:
            try:
                await asyncio.to_thread(shelf.sweep)
                for work in await asyncio.to_thread(shelf.waiting):
                    self._take(shelf, work)
            except (StorageError, OSError) as err:
                logger.error("batches cannot be looked for: %s", err)
            await asyncio.sleep(self._tuning.look_s)

    def _take(self, shelf: BatchShelf, work: Work) -> None:
        """Run a batch, unless it runs here already or too many do."""
        if work.batch_id in self._running or len(self._running) >= self._tuning.max_batches:
            return
        task = asyncio.create_task(self._run(shelf, work))
        self._running[work.batch_id] = task
        task.add_done_callback(lambda _: self._running.pop(work.batch_id))

    async def _run(self, shelf: BatchShelf, work: Work) -> None:
        try:
            with contextlib.ExitStack() as stack:
                answers = stack.enter_context(AnswerFile(shelf.answers(work.batch_id)))
                failures = stack.enter_context(AnswerFile(shelf.failures(work.batch_id)))
                if not shelf.is_waiting(work.batch_id):  # it has just ended elsewhere
                    await asyncio.to_thread(shelf.end, work.batch_id)
                    return
                batch = await asyncio.to_thread(shelf.get, work.tenant, work.batch_id)
                if batch is not None:  # else its time is over
                    run = _OneBatch(self._gateway, shelf, work, batch, answers, failures)
                    await run.run(self._routes, self._tuning)
                await asyncio.to_thread(shelf.end, work.batch_id)
        except ConflictError:
            return  # another gateway runs it
        except Exception:
            logger.exception("batch %s stands still", work.batch_id)
            await asyncio.sleep(self._tuning.look_s)


class _OneBatch:
    """A batch that this gateway runs; nobody else writes it."""

    def __init__(
        self,
        gateway: Gateway,
        shelf: BatchShelf,
        work: Work,
        batch: Batch,
        answers: AnswerFile,
        failures: AnswerFile,
    ) -> None:
        self._gateway = gateway
        self._shelf = shelf
        self._tenant = work.tenant
        self._batch = batch
        self._answers = answers
        self._failures = failures

    async def run(self, routes: Sequence[Route], tuning: BatchTuning) -> None:
        """Run what is left, and store the end. Raises ``StorageError`` where that cannot be."""
        batch = self._batch
        limits = BatchLimits(endpoints=(batch.endpoint,))
        path = self._shelf.requests(batch.id)
        try:
            requests = await asyncio.to_thread(RequestFile.check, path, limits)
            account = await self._account()
        except RequestError as err:
            problem = BatchProblem(code=err.code, message=err.message, param=err.param)
            await self._save("failed", errors=[problem])
            return
        if batch.in_progress_at is None:
            await self._save("in_progress", in_progress_at=int(time.time()))
        end: BatchStatus = "completed"
        work = asyncio.create_task(self._ask(requests, account, routes, tuning))
        try:
            while not work.done():
                if self._shelf.is_cancelled(batch.id):
                    end = "cancelled"
                elif time.time() >= batch.expires_at:
                    end = "expired"
                if end != "completed":
                    break
                await asyncio.wait([work], timeout=tuning.look_s)
                await self._count(len(requests))
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        await self._finish(end)

    async def _ask(
        self,
        requests: RequestFile,
        account: Account | None,
        routes: Sequence[Route],
        tuning: BatchTuning,
    ) -> None:
        chosen = [route for route in routes if route.path == self._batch.endpoint]
        calls = InnerCalls(self._gateway, chosen, account, tuning.priority)

        async def send(request: BatchRequest) -> BatchAnswer:
            if self._gateway.is_leaving:
                raise UnreachableError("this gateway is about to stop")
            return await calls.send(request)

        batch = BatchRun(
            requests, self._answers, self._failures, send, tuning.concurrency, _NEVER_S
        )
        await batch.run()

    async def _account(self) -> Account | None:
        """The client's. Raises ``RequestError`` where its key is not known any more."""
        keys = self._gateway.keys
        await keys.read_changes()
        if keys.is_open:
            return None
        account = keys.account_of(self._tenant)
        if account is None:
            raise RequestError("the key that made the batch is not known any more", None, "no_key")
        return account

    @property
    def _counts(self) -> RequestCounts:
        failed = self._failures.num_failed
        completed = len(self._answers.done)
        total = max(self._batch.request_counts.total, completed + failed)
        return RequestCounts(total=total, completed=completed, failed=failed)

    async def _count(self, total: int) -> None:
        counts = msgspec.structs.replace(self._counts, total=total)
        if counts != self._batch.request_counts:
            await self._save(self._batch.status, request_counts=counts)

    async def _finish(self, end: BatchStatus) -> None:
        """Store the files of answers, and then the batch's end; done again after a kill."""
        shelf, batch, now_s = self._shelf, self._batch, int(time.time())
        if batch.finalizing_at is None:
            await self._save(
                "finalizing",
                finalizing_at=now_s,
                request_counts=self._counts,
                output_file_id=shelf.new_file_id() if self._answers.done else None,
                error_file_id=shelf.new_file_id() if self._failures.done else None,
                cancelling_at=now_s if end == "cancelled" else None,
            )
        batch = self._batch
        try:
            await self._put(batch.output_file_id, shelf.answers(batch.id), "output")
            await self._put(batch.error_file_id, shelf.failures(batch.id), "errors")
        except StorageFullError as err:
            problem = BatchProblem(code="storage_full", message=str(err))
            await self._save("failed", errors=[problem], output_file_id=None, error_file_id=None)
            return
        await self._save(end)

    async def _put(self, file_id: str | None, path: Path, what: str) -> None:
        if file_id is None:
            return
        batch = self._batch

        def put() -> None:
            name = f"{batch.id}_{what}.jsonl"
            self._shelf.put_file(
                self._tenant,
                name,
                path.read_bytes(),
                is_output=True,
                ttl_s=batch.output_ttl_s,
                file_id=file_id,
            )

        await asyncio.to_thread(put)

    async def _save(self, status: BatchStatus, **changed: Any) -> None:
        if status in ("completed", "failed", "expired", "cancelled"):
            changed[f"{status}_at"] = int(time.time())
        self._batch = msgspec.structs.replace(self._batch, status=status, **changed)
        await asyncio.to_thread(self._shelf.save, self._tenant, self._batch)
