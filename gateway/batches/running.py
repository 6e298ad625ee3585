"""Runs one batch: sends its requests and stores its output files."""

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

from cluster.batches.requests import BatchLimits, BatchRequest, LineError, RequestFile
from cluster.batches.response_file import ResponseFile
from cluster.batches.run import BatchResponse, BatchRun, RunInThread, UnreachableError
from cluster.core.errors import ConflictError, RequestError
from gateway.auth.key_limits import KeyUsage
from gateway.batches.batch_store import BatchStore, WorkPart
from gateway.batches.in_process_client import InProcessClient
from gateway.batches.objects import ENDED, BatchError, BatchStatus, RequestCounts, StoredBatch
from gateway.calls.gateway import Gateway
from gateway.core.errors import StorageError, StorageFullError

logger = logging.getLogger(__name__)

TRANSIENT_ERRORS = (StorageError, OSError)
"""Disk errors, which pause a batch."""
_NEVER_S = float("inf")
_FULL_SHARE = 0.9
"""Fraction of a key's storage limit; a batch fails when a file of its responses is larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTuning:
    """Limits and intervals of batches."""

    poll_s: float = 2.0
    """Interval in seconds at which a gateway looks for batches and cancellations."""
    retry_s: float = 10.0
    """Seconds until a paused batch is retried; doubled after each consecutive failure."""
    max_retry_s: float = 600.0
    """Maximum of ``retry_s`` after doubling."""
    disk_limit_s: float = 600.0
    """Longest time in seconds that responses wait in memory while writes to the disk fail."""
    max_batches: int = 4
    """Maximum number of batches that a gateway runs at a time."""
    concurrency: int = 64
    """Maximum number of requests of a batch that run at a time."""
    priority: int = 1
    """Default priority of a batch's requests. Other requests have 0 and run first."""


class RunningBatch:
    """A batch that this gateway runs. No other process writes its files.

    Args:
        gateway: the replica.
        batches: store of the batch.
        tenant: tenant of the batch.
        batch: last stored state.
        answers: successful responses so far.
        failures: failed responses so far.
        disk: runs functions that wait for the disk.
    """

    def __init__(
        self,
        gateway: Gateway,
        batches: BatchStore,
        tenant: str,
        batch: StoredBatch,
        answers: ResponseFile,
        failures: ResponseFile,
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
        """Run the batch to its end. After ``TRANSIENT_ERRORS``, a further call continues it."""
        if self._batch.finalizing_at is None:
            problem = await self._send_all(routes, tuning)
            if problem is not None and not (
                self._answers.answered_ids or self._failures.answered_ids
            ):
                await self._save("failed", errors=[problem])
                return
            await self._finalize(problem)
        await self._finish()

    async def _send_all(self, routes: Sequence[Route], tuning: BatchTuning) -> BatchError | None:
        """Send requests until none is left or the batch must end; return an error, or None."""
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
        work = asyncio.create_task(self._send_requests(requests, account, routes, tuning))
        try:
            while not (work.done() or await self._must_end()):
                await asyncio.wait([work], timeout=tuning.poll_s)
                await self._save_counts(len(requests))
                await self._account()
        except RequestError as err:
            problem = _problem(err)
        finally:
            work.cancel()
            await asyncio.wait([work])
        return problem or (None if work.cancelled() else self._to_batch_error(work.exception()))

    async def _send_requests(
        self,
        requests: RequestFile,
        account: KeyUsage | None,
        routes: Sequence[Route],
        tuning: BatchTuning,
    ) -> None:
        chosen = [route for route in routes if route.path == self._batch.endpoint]
        calls = InProcessClient(self._gateway, chosen, account, tuning.priority)

        async def send(request: BatchRequest) -> BatchResponse:
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

    async def _must_end(self) -> bool:
        """Whether the batch was cancelled or has expired; False if the disk cannot be read."""
        try:
            return await self._disk(partial(self._batches.must_end, self._batch))
        except TRANSIENT_ERRORS as err:  # responses that wait for the disk are kept
            logger.error("could not read whether batch %s must end: %s", self._batch.id, err)
            return False

    def _check_size(self) -> None:
        """Raise ``RequestError`` if further responses would not fit into one file."""
        most = int(_FULL_SHARE * self._files.max_bytes)
        if max(self._answers.num_bytes, self._failures.num_bytes) > most:
            message = f"the answers have more than {most} bytes: make several batches of the rest"
            raise RequestError(message, None, "answers_too_large")

    def _to_batch_error(self, error: BaseException | None) -> BatchError | None:
        """Convert the error that stopped a batch. Raises ``error`` if it is transient."""
        while isinstance(error, BaseExceptionGroup) and len(set(map(type, error.exceptions))) == 1:
            error = error.exceptions[0]  # concurrent requests fail in the same way
        if error is None:
            return None
        if isinstance(error, RequestError):
            return _problem(error)
        if isinstance(error, ConflictError):
            return damaged_output_error(error)
        if is_transient(error):
            raise error
        logger.error("batch %s failed", self._batch.id, exc_info=error)
        message = "the server failed to run a request: see its log"
        return BatchError(code="internal_error", message=message)

    async def _account(self) -> KeyUsage | None:
        """Return the key's usage; None without keys. Raises ``RequestError`` for a removed key."""
        keys = self._gateway.keys
        await keys.read_changes()
        if keys.is_open:
            return None
        account = keys.usage_of(self._tenant)
        if account is None:
            raise RequestError("the key that made the batch was removed", None, "no_key")
        return account

    # ---- state for clients -------------------------------------------------------------------

    @property
    def _counts(self) -> RequestCounts:
        failed = self._failures.num_failed
        completed = len(self._answers.answered_ids)
        total = max(self._batch.request_counts.total, completed + failed)
        return RequestCounts(total=total, completed=completed, failed=failed)

    async def _save_counts(self, total: int) -> None:
        """Store the request counts. A disk error is only logged, as a later call stores them."""
        counts = msgspec.structs.replace(self._counts, total=total)
        if counts != self._batch.request_counts:
            try:
                await self._save(self._batch.status, request_counts=counts)
            except TRANSIENT_ERRORS as err:  # responses that wait for the disk are kept
                logger.error("could not store the counts of batch %s: %s", self._batch.id, err)

    async def _finalize(self, problem: BatchError | None) -> None:
        """Store the status ``finalizing``, after which no gateway sends further requests."""
        files, now_s, counts = self._files, int(time.time()), self._counts
        is_cancelled = await self._disk(partial(self._batches.is_cancelled, self._batch.id))
        is_cancelled = is_cancelled and not counts.is_complete
        await self._save(
            "finalizing",
            finalizing_at=now_s,
            request_counts=counts,
            output_file_id=files.new_id() if self._answers.answered_ids else None,
            error_file_id=files.new_id() if self._failures.answered_ids else None,
            cancelling_at=now_s if is_cancelled else None,
            errors=[problem] if problem is not None else [],
        )

    async def _finish(self) -> None:
        """Store the output files, then the final status of the batch.

        While the key's storage or the disk is full, raises for a retry; an expired batch fails.
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
    """Copy a batch with another status and other changes."""
    if status in ENDED:
        changed[f"{status}_at"] = int(time.time())
    return msgspec.structs.replace(batch, status=status, **changed)


def damaged_output_error(error: ConflictError) -> BatchError:
    """Make the error of a batch whose responses cannot be read."""
    return BatchError(code="answers_damaged", message=str(error))


def is_transient(error: BaseException) -> bool:
    """Whether ``error``, or every error in the group, is a disk error."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_transient, error.exceptions))
    return isinstance(error, TRANSIENT_ERRORS)


def _problem(error: RequestError) -> BatchError:
    line = error.line if isinstance(error, LineError) else None
    return BatchError(code=error.code, message=error.message, param=error.param, line=line)


def _end_of(batch: StoredBatch) -> BatchStatus:
    """Final status of a batch whose files are stored."""
    if batch.errors:
        return "failed"
    if batch.cancelling_at is not None:
        return "cancelled"
    return "completed" if batch.request_counts.is_complete else "expired"
