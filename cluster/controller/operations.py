"""Operations: drains, scales and rebalances. Only one runs at a time. Plain values."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from cluster.core.codec import Message, to_plain
from cluster.core.errors import UNDER_WAY, ConflictError, UnknownNameError
from cluster.core.states import next_state

_KEPT = 64


class OperationState(Enum):
    """State of an operation (drain, scaling, rebalancing), named as in ``admin.proto``."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    """The operation failed; ``Operation.message`` gives the reason."""
    CANCELLED = "CANCELLED"
    """A client or the node follower cancelled the operation."""


_NEXT = {OperationState.RUNNING: set(OperationState) - {OperationState.RUNNING}}


@dataclass(kw_only=True, slots=True)
class Operation:
    """One drain, scaling or rebalancing that a client or a policy of the controller began."""

    id: str
    """Permanent id, made of the kind, the term of the controller and a number."""
    kind: str
    """``drain``, ``rebalance`` or ``scale``."""
    target: str
    """Subject, for messages: workers to drain, pool sizes after a scaling, or ``experts``."""
    request_id: str
    """Id chosen by the client, so that a retry begins no second operation; empty without one."""
    asked: str = ""
    """Content of the command, to detect a different command with the same ``request_id``."""
    started: float
    """Time of day at which the operation began, in seconds since 1970."""
    state: OperationState = OperationState.RUNNING
    phase: str = ""
    """Current phase of the operation, as a text for users; empty after the end."""
    progress: float = 0.0
    """Fraction of the operation that is done, 0 to 1."""
    message: str = ""
    """Outcome of the operation, as a text for users; empty before the end."""
    ended: float = 0.0
    """Time of day at which the operation ended, in seconds since 1970; 0 while it runs."""
    generation: int = 0
    """Number of the generation that the operation formed; 0 if it has formed none."""
    result: dict[str, Any] = field(default_factory=dict)
    """Fields of the operation's result, whose message in ``admin.proto`` depends on the kind."""

    @property
    def is_running(self) -> bool:
        """Whether the operation has not ended."""
        return self.state is OperationState.RUNNING

    def end(self, state: OperationState, message: str, at: float) -> None:
        """End the operation at time of day ``at`` (seconds since 1970)."""
        self.state = next_state(self.state, state, _NEXT)
        self.phase, self.message, self.ended = "", message, at
        if state is OperationState.SUCCEEDED:
            self.progress = 1.0

    def limit_end(self, at: float) -> None:
        """Shift times after time of day ``at`` back: the clock of another controller was ahead."""
        ahead_s = max(self.started, self.ended) - at
        if ahead_s > 0:
            self.started -= ahead_s
            self.ended = self.ended and self.ended - ahead_s

    def to_dict(self) -> dict[str, Any]:
        """Return the operation as plain data with the field names of ``admin.proto``."""
        hidden = ("request_id", "asked")
        return {name: value for name, value in to_plain(self).items() if name not in hidden}


_TOLD_S = 1.0
"""Precision of the remaining time that the next controller gets, in seconds."""


@dataclass(kw_only=True, slots=True)
class TimedOperation:
    """State of a running operation that the next controller restores, with the remaining time."""

    operation: Operation
    deadline: float
    """Monotonic time of the operation's time limit; valid only in this controller process."""
    left_s: float
    """Seconds until the deadline, for the next controller, whose clock differs."""

    def restore(self, operations: Operations, now: float) -> None:
        """Continue the operation of an earlier controller, once ``operations`` is restored."""
        self.operation = operations.find(self.operation.id)
        self.deadline = now + self.left_s

    def note_time_left(self, now: float) -> bool:
        """Update ``left_s``; returns whether it has changed enough to be sent to the workers."""
        left_s = max(self.deadline - now, 0.0)
        is_less = self.left_s - left_s >= _TOLD_S
        if is_less:
            self.left_s = left_s
        return is_less


class OperationCommand(Message, frozen=True, kw_only=True):
    """A command to begin an operation."""

    kind: ClassVar[str]
    """Kind of the operation: ``drain``, ``rebalance`` or ``scale``."""
    content: ClassVar[tuple[str, ...]]
    """Names of the fields in which commands with the same ``request_id`` must not differ."""

    request_id: str = ""
    """Id of the command: a repetition with the same id begins no second operation; may be empty."""
    expected_epoch: int | None = None
    """Placement epoch that must be in force for the command to be accepted; None for any."""

    @property
    def asked(self) -> str:
        """Content of the command as a text, to compare commands with the same ``request_id``."""
        return ", ".join(f"{name} {getattr(self, name)}" for name in self.content)


class Operations:
    """The latest operations of a cluster. At most one runs: the newest.

    ``now`` is in monotonic seconds.
    """

    def __init__(self, term: int, wall_time_offset_s: float, on_change: Callable[[], None]) -> None:
        """``wall_time_offset_s`` plus a monotonic time is the time of day.

        ``on_change`` is called when an operation begins or ends.
        """
        self.term = term
        """Term (number) of the controller process."""
        self._offset_s = wall_time_offset_s
        self._on_change = on_change
        self._count = 0
        self.kept: deque[Operation] = deque(maxlen=_KEPT)
        """Operations, newest last, including restored operations of an earlier controller."""

    @property
    def running(self) -> Operation | None:
        return self.kept[-1] if self.kept and self.kept[-1].is_running else None

    def find_repeated(self, command: OperationCommand, epoch: int) -> Operation | None:
        """Return the operation that a command with the same request id has begun, or None.

        ``epoch`` is the placement epoch in force. Raises ``ConflictError`` if the id belongs to a
        different operation, or if the command expects another epoch.
        """
        known, expected = command.request_id, command.expected_epoch
        found = next((o for o in self.kept if known and o.request_id == known), None)
        if found is None and expected not in (None, epoch):
            raise ConflictError(f"placement epoch {epoch} is in force, not {expected}")
        if found is not None and found.asked != command.asked:
            what = f"{found.id} ({found.kind} of {found.target})"
            raise ConflictError(f"request_id belongs to {what}, a different operation")
        return found

    def find(self, operation_id: str) -> Operation:
        """Return the operation with this id. Raises ``UnknownNameError``."""
        for operation in self.kept:
            if operation.id == operation_id:
                return operation
        raise UnknownNameError(f"there is no operation {operation_id[:64]!r}")

    def check_free(self) -> None:
        """Raise ``ConflictError`` while an operation runs."""
        running = self.running
        if running is not None:
            about = f"{running.id} ({running.kind} of {running.target})"
            raise ConflictError(f"{about} {UNDER_WAY}: one operation at a time")

    def begin(self, command: OperationCommand, target: str, now: float) -> Operation:
        """Record that an operation begins, and return it; no other operation may be running."""
        self._count += 1
        operation = Operation(
            id=f"{command.kind}-{self.term}.{self._count}",
            kind=command.kind,
            target=target,
            request_id=command.request_id,
            asked=command.asked,
            started=self.time_of_day(now),
        )
        self.kept.append(operation)
        self._on_change()
        return operation

    def end(self, operation: Operation, state: OperationState, message: str, now: float) -> None:
        operation.end(state, message, self.time_of_day(now))
        self._on_change()

    def restore(
        self, newest: Iterable[Operation], now: float, goes_on: Collection[str] = ()
    ) -> None:
        """Restore operations of an earlier controller; running ones fail, unless in ``goes_on``.

        ``goes_on`` are the ids of the operations that continue.
        """
        for operation in newest:
            operation.limit_end(self.time_of_day(now))
            self.kept.append(operation)
            if operation.is_running and operation.id not in goes_on:
                why = "the controller was restarted"
                operation.end(OperationState.FAILED, why, self.time_of_day(now))

    def to_list(self) -> list[dict[str, Any]]:
        """Return all operations, newest last, as JSON-compatible data."""
        return [o.to_dict() for o in self.kept]

    def time_of_day(self, now: float) -> float:
        """Convert a monotonic time to seconds since 1970."""
        return round(now + self._offset_s, 3)
