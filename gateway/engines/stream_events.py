"""Events of the streams to the workers, which the pool handles."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from gateway.engines.submission import Submission
from workers.requests.block_hash import KvEvents
from workers.requests.wire import Paused, Prefetched

if TYPE_CHECKING:
    from gateway.engines.engine_client import EngineClient


class RequestChange(Enum):
    """What has happened to a request at its worker."""

    QUEUED_ALONE = "the engine has it, and it had to be sent alone: another one may be sent"
    PROMPT_SETTLED = "its prompt is computed, or will not be computed there"
    PROMPT_COMPUTED = "its prompt is computed, and the worker continues with it"
    KV_PRESSURE = "the worker runs out of KV blocks, and would preempt it soon"
    RETURNED = "the worker will not finish it, and another one can"
    RELEASED = "it has left its worker, or has ended"


@dataclass(slots=True)
class RequestEvent:
    """A change of one request."""

    change: RequestChange
    client: EngineClient
    entry: Submission


@dataclass(slots=True)
class TokensReceived:
    """A step of a worker brought tokens of these requests."""

    entries: Sequence[Submission]
    now_s: float


@dataclass(slots=True)
class MessageReceived:
    """A message of a worker that the pool handles: of KV blocks, and of requests that move."""

    client: EngineClient
    message: KvEvents | Prefetched | Paused


StreamEvent = RequestEvent | TokensReceived | MessageReceived


class StreamEvents:
    """The events of all streams; decides their order: one that is put while another is handled is
    handled after it.
    """

    def __init__(self, handle: Callable[[StreamEvent], None]) -> None:
        self._handle = handle
        self._queue: deque[StreamEvent] = deque()
        self._is_handling = False

    def put(self, event: StreamEvent) -> None:
        self._queue.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._queue:
                self._handle(self._queue.popleft())
        finally:
            self._is_handling = False
