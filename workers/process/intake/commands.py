"""Commands from the engine streams to the engine's thread, and their queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from workers.requests.block_hash import BlockHash
from workers.requests.request import Request, SoloStep
from workers.requests.wire import Abort, KeepCopy, Pause


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Command to run a request of a gateway."""

    gateway: str
    request: Request
    received: float
    """Monotonic time in seconds at which the stream delivered the request."""
    hashes: tuple[BlockHash, ...] = ()
    """Hashes of the full KV blocks of the prompt, in order; empty if blocks are not shared."""


@dataclass(frozen=True, slots=True)
class PrefetchRequested:
    """Command to fetch the KV blocks of a request that a gateway will move to this worker."""

    gateway: str
    request: Request
    chains: tuple[tuple[BlockHash, ...], ...]
    """Hashes of the full KV blocks of each open choice; empty if blocks are not shared."""


@dataclass(frozen=True, slots=True)
class CopyRequested:
    """Command to copy KV blocks of another worker into the lower tiers of this worker."""

    gateway: str
    message: KeepCopy


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """Command to abort or pause a request, or an acknowledgement of a solo step."""

    gateway: str
    message: Abort | Pause | SoloStep


@dataclass(frozen=True, slots=True)
class GatewayDisconnected:
    """Command to abort the requests of a gateway whose stream ended."""

    gateway: str


GatewayCommand = (
    AddRequest | PrefetchRequested | CopyRequested | MessageReceived | GatewayDisconnected
)


class Inbox:
    """Queue of commands from the streams to the engine's thread; calls ``wake`` after each."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._commands: deque[GatewayCommand] = deque()
        self._wake = wake

    def put(self, command: GatewayCommand) -> None:
        """Add a command (any thread)."""
        self._commands.append(command)
        self._wake()

    def take(self) -> list[GatewayCommand]:
        """Remove and return all queued commands (engine's thread only)."""
        return [self._commands.popleft() for _ in range(len(self._commands))]
