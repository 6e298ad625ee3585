"""Run a batch: send what has no answer yet, some requests at a time, and write the answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.batches.answers import LINE_ID, AnswerFile, is_success
from cluster.batches.requests import BatchRequest, RequestFile
from cluster.core.errors import ConflictError

_FULL, _AWAY = frozenset({408, 429}), frozenset({502, 503})
"""Statuses of servers that are full (408: too long, the request's time was over before it began),
and of those that cannot serve now."""
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 30.0
_SYNC_S = 1.0
"""At most as much work is lost with the machine."""


class UnreachableError(Exception):
    """No answer came: the connection failed or broke."""


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """What a server says to a request."""

    status: int
    """HTTP status."""
    body: Any
    request_id: str = ""
    retry_after_s: float | None = None
    """When to ask again, if the server says that."""


Send = Callable[[BatchRequest], Awaitable[BatchAnswer]]
"""Sends a request. Raises ``UnreachableError``."""


@dataclass(slots=True)
class BatchCounts:
    """How far a batch is."""

    total: int
    completed: int = 0
    failed: int = 0

    @property
    def left(self) -> int:
        """Requests without an answer."""
        return self.total - self.completed - self.failed


@dataclass
class BatchRun:
    """One batch, from what its file of answers has to its end.

    A request whose answer is not in the file when the process dies is sent again: it may run twice,
    but has one answer. Raises ``ConflictError`` where the files answer another batch.
    """

    requests: RequestFile
    answers: AnswerFile
    errors: AnswerFile
    """Of answers that are no success; may be the same as ``answers``."""
    send: Send
    concurrency: int
    """Requests that run at a time."""
    give_up_s: float
    """A batch ends when nothing could be reached for so long."""
    on_progress: Callable[[BatchCounts], None] = lambda counts: None
    clock: Callable[[], float] = time.monotonic
    counts: BatchCounts = field(init=False)
    _reached_s: float = field(init=False)

    def __post_init__(self) -> None:
        files = {self.answers, self.errors}
        done = set[str]().union(*(file.done for file in files))
        if others := sorted(done - self.requests.ids):
            raise ConflictError(f"the batch has no request {others[0][:64]!r}, which is answered")
        failed = sum(file.num_failed for file in files)
        self.counts = BatchCounts(len(self.requests), len(done) - failed, failed)
        self._reached_s = self.clock()

    async def run(self) -> None:
        """Returns when each request has an answer.

        Raises:
            UnreachableError: nothing could be reached for ``give_up_s``.
            OSError: an answer could not be written.
        """
        left = self._left()
        self.on_progress(self.counts)
        syncs = asyncio.create_task(self._sync_often())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, self.counts.left)):
                    group.create_task(self._work(left))
        finally:
            syncs.cancel()
        await asyncio.to_thread(self._sync)

    def _left(self) -> Iterator[BatchRequest]:
        done = self.answers.done | self.errors.done
        return (one for one in self.requests.requests() if one.custom_id not in done)

    async def _work(self, left: Iterator[BatchRequest]) -> None:
        for request in left:
            self._write(request, await self._ask(request))

    async def _ask(self, request: BatchRequest) -> BatchAnswer:
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
            await asyncio.sleep(min(_MAX_WAIT_S, wait_s if pause_s is None else pause_s))
            wait_s = min(2 * wait_s, _MAX_WAIT_S)

    def _is_lost(self) -> bool:
        return self.clock() - self._reached_s > self.give_up_s

    def _write(self, request: BatchRequest, answer: BatchAnswer) -> None:
        is_good = is_success(answer.status)
        file = self.answers if is_good else self.errors
        file.append(request.custom_id, answer_line(request, answer))
        self.counts.completed += is_good
        self.counts.failed += not is_good
        self.on_progress(self.counts)

    async def _sync_often(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_S)
            await asyncio.to_thread(self._sync)

    def _sync(self) -> None:
        self.answers.sync()
        self.errors.sync()


def answer_line(request: BatchRequest, answer: BatchAnswer) -> dict[str, Any]:
    """A line of the file of answers, in OpenAI's format."""
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
