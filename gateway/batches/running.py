"""One batch while a gateway runs it: its requests are asked, its answers become files."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.routing import Route

from cluster.batches.answer_file import AnswerFile
from cluster.batches.requests import BatchLimits, BatchRequest, LineError, RequestFile
from cluster.batches.run import BatchAnswer, BatchRun, RunInThread, UnreachableError
from cluster.core.errors import ConflictError, RequestError
from gateway.auth.key_limits import KeyUsage
from gateway.batches.batch_store import BatchStore, WorkPart
from gateway.batches.inner_calls import InnerCalls
from gateway.batches.objects import ENDED, BatchError, BatchStatus, RequestCounts, StoredBatch
from gateway.core.errors import StorageError, StorageFullError
from gateway.generation.gateway import Gateway

logger = logging.getLogger(__name__)

TRANSIENT_ERRORS = (StorageError, OSError)
"""Errors of the disk: a batch stands still until they are over."""
_NEVER_S = float("inf")
_FULL_SHARE = 0.9
"""Part of what a key may store at which a batch asks no more, so that its answers fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTuning:
    """How batches are run."""

    look_s: float = 2.0
    """Interval at which a gateway looks for batches and for orders to end one."""
    retry_s: float = 10.0
    """Time after which a paused batch is tried again; it doubles with each failure in a row."""
    max_retry_s: float = 600.0
    """Longest such time."""
    disk_limit_s: float = 600.0
    """Longest time for which answers wait in memory for a disk that refuses them."""
    max_batches: int = 4
    """Batches that a gateway runs at a time."""
    concurrency: int = 64
    """Requests of a batch that run at a time."""
    priority: int = 1
    """Of requests that name none: after those of others."""


class RunningBatch:
    """A batch that this gateway runs; nobody else writes it.

    Args:
        gateway: it answers.
        batches: where the batch is.
        tenant: whose it is.
        batch: as it was stored last.
        answers: its answers so far.
        failures: those that are no success.
        disk: runs everything that waits for the disk.
    """

    def __init__(
        self,
        gateway: Gateway,
        batches: BatchStore,
        tenant: str,
        batch: StoredBatch,
        answers: AnswerFile,
        failures: AnswerFile,
        disk: RunInThread,
    ) -> None:
        self._gateway = gateway
        self._batches = batches
        self._files = batches.files
        self._tenant = tenant
        self._batch = batch
        self._answers = answers
        self._failures = failures
        self._disk = disk

    async def run(self, routes: Sequence[Route], tuning: BatchTuning) -> None:
        """Run what is left, and store the end. Raises ``TRANSIENT_ERRORS``: try again later."""
        if self._batch.finalizing_at is None:
            problem = await self._ask_all(routes, tuning)
            if problem is not None and not (self._answers.done or self._failures.done):
                await self._save("failed", errors=[problem])
                return
            await self._finalize(problem)
        await self._finish()

    async def _ask_all(self, routes: Sequence[Route], tuning: BatchTuning) -> BatchError | None:
        """Ask until nothing is left, or the batch is to end. Returns what went wrong."""
        limits = BatchLimits(endpoints=(self._batch.endpoint,))
        path = self._batches.path(self._batch.id, WorkPart.REQUESTS)
        try:
            requests = await self._disk(partial(RequestFile.check, path, limits))
            account = await self._account()
        except RequestError as err:
            return _problem(err)
        if self._batch.in_progress_at is None:
            counts = RequestCounts(total=len(requests))
            await self._save("in_progress", in_progress_at=int(time.time()), request_counts=counts)
        problem = None
        work = asyncio.create_task(self._ask(requests, account, routes, tuning))
        try:
            while not (work.done() or await self._is_over()):
                await asyncio.wait([work], timeout=tuning.look_s)
                await self._count(len(requests))
                await self._account()
        except RequestError as err:
            problem = _problem(err)
        finally:
            work.cancel()
            await asyncio.wait([work])
        return problem or (None if work.cancelled() else self._failure(work.exception()))

    async def _ask(
        self,
        requests: RequestFile,
        account: KeyUsage | None,
        routes: Sequence[Route],
        tuning: BatchTuning,
    ) -> None:
        chosen = [route for route in routes if route.path == self._batch.endpoint]
        calls = InnerCalls(self._gateway, chosen, account, tuning.priority)

        async def send(request: BatchRequest) -> BatchAnswer:
            self._check_size()
            if self._gateway.readiness.is_leaving:
                raise UnreachableError("this gateway is about to stop")
            return await calls.send(request)

        batch = BatchRun(
            requests,
            self._answers,
            self._failures,
            send,
            tuning.concurrency,
            _NEVER_S,
            in_thread=self._disk,
            disk_limit_s=tuning.disk_limit_s,
        )
        await batch.run()

    async def _is_over(self) -> bool:
        """Whether the batch is to end though requests are left; False while it cannot be known."""
        try:
            return await self._disk(partial(self._batches.is_over, self._batch))
        except TRANSIENT_ERRORS as err:  # answers that wait for the disk are kept
            logger.error("whether batch %s is to end cannot be known: %s", self._batch.id, err)
            return False

    def _check_size(self) -> None:
        """Raise ``RequestError`` where more answers would not fit into one file."""
        most = int(_FULL_SHARE * self._files.max_bytes)
        if max(self._answers.num_bytes, self._failures.num_bytes) > most:
            message = f"the answers have more than {most} bytes: make several batches of the rest"
            raise RequestError(message, None, "answers_too_large")

    def _failure(self, error: BaseException | None) -> BatchError | None:
        """Why no more can be asked. Raises ``error`` where it passes."""
        while isinstance(error, BaseExceptionGroup) and len(set(map(type, error.exceptions))) == 1:
            error = error.exceptions[0]  # requests that run beside each other fail alike
        if error is None:
            return None
        if isinstance(error, RequestError):
            return _problem(error)
        if isinstance(error, ConflictError):
            return damaged_output_error(error)
        if is_transient(error):
            raise error
        logger.error("batch %s fails", self._batch.id, exc_info=error)
        message = "the server failed at a request: its log says why"
        return BatchError(code="internal_error", message=message)

    async def _account(self) -> KeyUsage | None:
        """The client's. Raises ``RequestError`` where its key is not known any more."""
        keys = self._gateway.keys
        await keys.read_changes()
        if keys.is_open:
            return None
        account = keys.account_of(self._tenant)
        if account is None:
            raise RequestError("the key that made the batch is not known any more", None, "no_key")
        return account

    # ---- what clients see --------------------------------------------------------------------

    @property
    def _counts(self) -> RequestCounts:
        failed = self._failures.num_failed
        completed = len(self._answers.done)
        total = max(self._batch.request_counts.total, completed + failed)
        return RequestCounts(total=total, completed=completed, failed=failed)

    async def _count(self, total: int) -> None:
        """Store how far the batch is, unless the disk refuses that: a later call does."""
        counts = msgspec.structs.replace(self._counts, total=total)
        if counts != self._batch.request_counts:
            try:
                await self._save(self._batch.status, request_counts=counts)
            except TRANSIENT_ERRORS as err:  # answers that wait for the disk are kept
                logger.error("the counts of batch %s cannot be stored: %s", self._batch.id, err)

    async def _finalize(self, problem: BatchError | None) -> None:
        """No more is asked: from now on the batch only ends, also after a kill."""
        files, now_s, counts = self._files, int(time.time()), self._counts
        is_cancelled = await self._disk(partial(self._batches.is_cancelled, self._batch.id))
        is_cancelled = is_cancelled and not counts.is_all
        await self._save(
            "finalizing",
            finalizing_at=now_s,
            request_counts=counts,
            output_file_id=files.new_id() if self._answers.done else None,
            error_file_id=files.new_id() if self._failures.done else None,
            cancelling_at=now_s if is_cancelled else None,
            errors=[problem] if problem is not None else [],
        )

    async def _finish(self) -> None:
        """Store the files of answers, and then the batch's end.

        A full key or disk may have room later: until the batch's time is over, that is waited for.
        """
        batch = self._batch
        try:
            await self._put(batch.output_file_id, WorkPart.ANSWERS, "output")
            await self._put(batch.error_file_id, WorkPart.FAILURES, "errors")
        except StorageFullError as err:
            if not await self._disk(partial(self._batches.has_expired, batch)):
                raise
            problem = BatchError(code="storage_full", message=str(err))
            await self._save("failed", errors=[problem], output_file_id=None, error_file_id=None)
            return
        await self._save(_end_of(batch))

    async def _put(self, file_id: str | None, part: WorkPart, what: str) -> None:
        if file_id is None:
            return
        batch = self._batch

        def put() -> None:
            name = f"{batch.id}_{what}.jsonl"
            path = self._batches.path(batch.id, part)
            self._files.put_output(self._tenant, name, path, file_id, batch.output_ttl_s)

        await self._disk(put)

    async def _save(self, status: BatchStatus, **changed: Any) -> None:
        batch = with_status(self._batch, status, **changed)
        await self._disk(partial(self._batches.save, self._tenant, batch))
        self._batch = batch


def with_status(batch: StoredBatch, status: BatchStatus, **changed: Any) -> StoredBatch:
    """A batch with another status, and other changes."""
    if status in ENDED:
        changed[f"{status}_at"] = int(time.time())
    return msgspec.structs.replace(batch, status=status, **changed)


def damaged_output_error(error: ConflictError) -> BatchError:
    """What a client is told of answers that cannot be read."""
    return BatchError(code="answers_damaged", message=str(error))


def is_transient(error: BaseException) -> bool:
    """Whether errors of the disk are all that went wrong."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_transient, error.exceptions))
    return isinstance(error, TRANSIENT_ERRORS)


def _problem(error: RequestError) -> BatchError:
    line = error.line if isinstance(error, LineError) else None
    return BatchError(code=error.code, message=error.message, param=error.param, line=line)


def _end_of(batch: StoredBatch) -> BatchStatus:
    """The status of a batch whose files are stored."""
    if batch.errors:
        return "failed"
    if batch.cancelling_at is not None:
        return "cancelled"
    return "completed" if batch.request_counts.is_all else "expired"
