"""Commands from the engine streams to the engine loop, and the inbox that carries them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from workers.requests.block_hash import BlockHash
from workers.requests.request import Request, SoloStep
from workers.requests.wire import Abort, KeepCopy, Pause


@dataclass(frozen=True, slots=True)
class AddRequest:
    """A gateway submits a request."""

    gateway: str
    request: Request
    received: float
    """Monotonic seconds at which the stream delivered it."""
    hashes: tuple[BlockHash, ...] = ()
    """Of the full KV blocks of its prompt, in order; none where requests share no blocks."""


@dataclass(frozen=True, slots=True)
class PrefetchAsked:
    """A gateway will move a request here, and wants its KV blocks to be here before."""

    gateway: str
    request: Request
    chains: tuple[tuple[BlockHash, ...], ...]
    """Hashes of the full KV blocks of each open choice; none where requests share no blocks."""


@dataclass(frozen=True, slots=True)
class CopyAsked:
    """A gateway wants copies of another worker's blocks to be kept here."""

    gateway: str
    message: KeepCopy


@dataclass(frozen=True, slots=True)
class MessageTaken:
    """A gateway aborts or pauses a request, or has noted which one runs the next step alone."""

    gateway: str
    message: Abort | Pause | SoloStep


@dataclass(frozen=True, slots=True)
class GatewayGone:
    """A gateway's stream ended: its requests are aborted."""

    gateway: str


Command = AddRequest | PrefetchAsked | CopyAsked | MessageTaken | GatewayGone


class Inbox:
    """Commands from the streams to the engine loop; ``wake`` is called after each."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._commands: deque[Command] = deque()
        self._wake = wake

    def put(self, command: Command) -> None:
        """Add a command (any thread)."""
        self._commands.append(command)
        self._wake()

    def take(self) -> list[Command]:
        """All commands that wait now (engine loop only)."""
        return [self._commands.popleft() for _ in range(len(self._commands))]
