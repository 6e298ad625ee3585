"""Runs a batch: sends the requests without a response, several at a time, and writes responses."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

from cluster.batches.requests import BatchRequest, RequestFile
from cluster.batches.response_file import LINE_ID, ResponseFile, is_success
from cluster.core.errors import ConflictError
from cluster.disk.threads import run_to_completion

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_FULL, _AWAY = frozenset({408, 429}), frozenset({502, 503})
"""HTTP statuses after which a request is sent again: ``_FULL`` of full servers (408: the request
timed out before it started), ``_AWAY`` of servers that cannot serve now.
"""
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 30.0
_READ_AHEAD = 16
"""Number of requests that are read from the batch file at a time."""
_SYNC_S = 1.0
"""Seconds between syncs; a crash of the machine loses at most the responses since the last sync."""


class UnreachableError(Exception):
    """No server was reachable: the connection failed or broke, or the server cannot serve now."""


@dataclass(frozen=True, slots=True)
class BatchResponse:
    """A server's response to one request of a batch."""

    status: int
    """HTTP status code."""
    body: Any
    request_id: str = ""
    retry_after_s: float | None = None
    """Seconds after which the server wants the request again; None if it sent no such value."""


SendRequest = Callable[[BatchRequest], Awaitable[BatchResponse]]
"""Function that sends a request and returns the response. Raises ``UnreachableError``."""


class RunInThread(Protocol):
    """Runs a disk call in a thread; the call completes even if the caller is cancelled."""

    async def __call__(self, call: Callable[[], Result], /) -> Result: ...


async def in_asyncio_thread(call: Callable[[], Result]) -> Result:
    """Run a call in a thread of asyncio; the call completes even if the caller is cancelled."""
    return await run_to_completion(asyncio.to_thread(call))


@dataclass(slots=True)
class BatchCounts:
    """Progress of a batch: numbers of requests, in total, with success and with an error."""

    total: int
    completed: int = 0
    failed: int = 0

    @property
    def left(self) -> int:
        """Number of requests without a response."""
        return self.total - self.completed - self.failed


@dataclass
class BatchRun:
    """Runs one batch: continues from its response file and ends when every request has a response.

    If the process dies before a response is written, the request is sent again: the request may run
    twice, but gets one response. While the disk rejects responses, they wait in memory and no
    further request is sent. Raises ``ConflictError`` if the files belong to another batch.
    """

    requests: RequestFile
    responses: ResponseFile
    errors: ResponseFile
    """File of error responses; may be the same as ``responses``."""
    send: SendRequest
    concurrency: int
    """Maximum number of requests that run at a time."""
    give_up_s: float
    """Time in seconds without a reachable server after which the batch fails."""
    on_progress: Callable[[BatchCounts], None] = lambda counts: None
    clock: Callable[[], float] = time.monotonic
    in_thread: RunInThread = in_asyncio_thread
    """Function that runs every disk call in a thread."""
    disk_limit_s: float = 0.0
    """Time in seconds for which rejected writes of responses are retried; 0: no retry."""
    counts: BatchCounts = field(init=False)
    _reached_s: float = field(init=False)
    _read: deque[BatchRequest] = field(init=False, default_factory=deque)
    _reading: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _writing: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        done = set[str]().union(*(file.answered_ids for file in self._files))
        if others := sorted(done - self.requests.ids):
            raise ConflictError(f"the batch has no request {others[0][:64]!r}, which is answered")
        failed = sum(file.num_failed for file in self._files)
        self.counts = BatchCounts(len(self.requests), len(done) - failed, failed)
        self._reached_s = self.clock()

    async def run(self) -> None:
        """Run until each request has a response.

        Raises, in an ``ExceptionGroup`` if requests were being sent:
            UnreachableError: no server could be reached for ``give_up_s``.
            OSError: responses could not be written for ``disk_limit_s``.
        """
        left = self._left()
        self.on_progress(self.counts)
        if self.counts.left:
            await self._write(self._check_disk_space)  # before any request is sent
        try:
            async with asyncio.TaskGroup() as group:
                syncs = group.create_task(self._sync_often())
                num_workers = min(self.concurrency, self.counts.left)
                workers = [group.create_task(self._work(left)) for _ in range(num_workers)]
                await asyncio.gather(*workers)
                syncs.cancel()
        finally:
            await self.in_thread(left.close)
        await self._write(self._sync)

    @property
    def _files(self) -> set[ResponseFile]:
        return {self.responses, self.errors}

    def _left(self) -> Generator[BatchRequest, None, None]:
        done = self.responses.answered_ids | self.errors.answered_ids
        return (one for one in self.requests.requests() if one.custom_id not in done)

    async def _work(self, left: Iterator[BatchRequest]) -> None:
        while (request := await self._next(left)) is not None:
            answer = await self._send_until_answered(request)
            is_good = is_success(answer.status)
            file = self.responses if is_good else self.errors
            line = response_line(request, answer)
            await self._write(partial(file.append, request.custom_id, line))
            self.counts.completed += is_good
            self.counts.failed += not is_good
            self.on_progress(self.counts)

    async def _next(self, left: Iterator[BatchRequest]) -> BatchRequest | None:
        async with self._reading:
            if not self._read:
                self._read.extend(await self.in_thread(lambda: list(islice(left, _READ_AHEAD))))
            return self._read.popleft() if self._read else None

    async def _send_until_answered(self, request: BatchRequest) -> BatchResponse:
        wait_s = _FIRST_WAIT_S
        while True:
            pause_s: float | None = None
            try:
                answer = await self.send(request)
                if answer.status not in _AWAY:
                    self._reached_s = self.clock()
                    if answer.status not in _FULL:
                        return answer
                elif self._is_lost():
                    raise UnreachableError(f"the server answers with status {answer.status}")
                pause_s = answer.retry_after_s
            except UnreachableError:
                if self._is_lost():
                    raise
            pause_s = wait_s if pause_s is None else max(pause_s, _FIRST_WAIT_S)
            await asyncio.sleep(min(_MAX_WAIT_S, pause_s))
            wait_s = min(2 * wait_s, _MAX_WAIT_S)

    def _is_lost(self) -> bool:
        return self.clock() - self._reached_s > self.give_up_s

    async def _write(self, call: Callable[[], None]) -> None:
        """Run the disk write ``call``, and retry while the disk rejects it.

        Other writes wait meanwhile. Raises ``OSError`` after ``disk_limit_s``.
        """
        async with self._writing:
            wait_s, failed_s = _FIRST_WAIT_S, None
            while True:
                try:
                    await self.in_thread(call)
                except OSError as err:
                    now_s = self.clock()
                    failed_s = now_s if failed_s is None else failed_s
                    if now_s - failed_s >= self.disk_limit_s:
                        raise
                    logger.error("responses of a batch wait for the disk: %s", err)
                else:
                    return
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _MAX_WAIT_S)

    async def _sync_often(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_S)
            await self._write(self._sync)

    def _check_disk_space(self) -> None:
        for file in self._files:
            file.check_disk_space()

    def _sync(self) -> None:
        for file in self._files:
            file.sync()


def response_line(request: BatchRequest, answer: BatchResponse) -> dict[str, Any]:
    """Return a line of the response file as a dict, in OpenAI's batch format."""
    return {
        "id": f"{LINE_ID}{uuid.uuid4().hex}",
        "custom_id": request.custom_id,
        "response": {
            "status_code": answer.status,
            "request_id": answer.request_id,
            "body": answer.body,
        },
        "error": None,
    }
