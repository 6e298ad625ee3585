"""Events of the gRPC streams to attention workers, which ``EnginePool`` handles."""

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
    """Change of a request's state at its attention worker."""

    QUEUED_ALONE = "the engine has received a request that was sent alone"
    WILL_PAUSE = "the engine has received a request that will be handed over"
    PROMPT_SETTLED = "its prompt is computed, or the worker will not compute it"
    PROMPT_COMPUTED = "its prompt is computed, and it has more tokens to generate"
    SUSPECTED = "workers died with the request, so that it must run alone"
    KV_PRESSURE = "the worker runs out of KV blocks and would soon preempt the request"
    RETURNED = "the worker has handed back the request, and another worker can run it"
    RELEASED = "the request has left its worker, or has ended"


@dataclass(slots=True)
class RequestEvent:
    """A change of one request's state at its worker."""

    change: RequestChange
    client: EngineClient
    entry: Submission


@dataclass(slots=True)
class TokensReceived:
    """Requests that received tokens in a step of a worker."""

    entries: Sequence[Submission]
    now_s: float


@dataclass(slots=True)
class MessageReceived:
    """A message of a worker about KV blocks or about a request that moves."""

    client: EngineClient
    message: KvEvents | Prefetched | Paused


StreamEvent = RequestEvent | TokensReceived | MessageReceived


class StreamEvents:
    """Queue of the events of all engine streams, handled one at a time in order of arrival.

    An event that the handler itself puts is handled after the current event.
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
