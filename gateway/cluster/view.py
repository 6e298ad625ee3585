"""The cluster as the gateway sees it: the controller's latest snapshot, followed by long-polling.

Without Ray: the controller is anything with the methods of ``ControllerCalls``;
``gateway.cluster.client`` finds the Ray actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.core.errors import NotReadyError
from cluster.core.topology import runs_attention

logger = logging.getLogger(__name__)

POLL_TIMEOUT_S = 10.0
"""How long the controller may hold one long-poll."""
CALL_TIMEOUT_S = 2.0
"""Limit for a fresh answer; after that the last known one is used."""
_RETRY_S = 0.2

Snapshot = Mapping[str, Any]
"""What ``ControllerCalls.snapshot`` returns."""


class ControllerCalls(Protocol):
    """The controller's calls that a gateway needs."""

    async def snapshot(self) -> dict[str, Any]:
        """The state now."""

    async def wait_snapshot(self, known_version: int, timeout_s: float) -> dict[str, Any]:
        """The state once its version differs from ``known_version``, or after ``timeout_s``."""

    async def placement(self) -> dict[str, Any]:
        """The placement, as ``placement --json`` prints it."""

    async def load(self) -> dict[str, Any]:
        """The experts' load, as ``load --json`` prints it."""

    async def drain(self, order: dict[str, Any]) -> dict[str, Any]:
        """Begin to drain: the fields of ``DrainOrder``; the operation.

        Raises ``ConflictError`` and ``UnknownNameError``.
        """

    async def rebalance(self, order: dict[str, Any]) -> dict[str, Any]:
        """Begin to rebalance: the fields of ``RebalanceOrder``; the operation.

        Raises ``ConflictError``.
        """

    async def operation(self, operation_id: str) -> dict[str, Any]:
        """One operation. Raises ``UnknownNameError``."""

    async def operations(self) -> list[dict[str, Any]]:
        """The recorded operations, newest last."""

    async def cancel_operation(self, operation_id: str) -> dict[str, Any]:
        """Cancel an operation. Raises ``UnknownNameError`` and ``ConflictError``."""


@dataclass(frozen=True, slots=True)
class AttentionEndpoint:
    """Where one attention worker can be reached."""

    name: str
    address: str
    """``host:port`` of its engine stream."""
    pid: int
    """Its process: another pid is another worker."""
    engine: str = ""
    """Its index among the attention workers, as metrics name it."""


@dataclass(slots=True)
class ClusterView:
    """Follows the controller; every consumer reads ``snapshot``.

    Args:
        find: finds the controller; called again after each loss. Raises if there is none.
    """

    find: Callable[[], Awaitable[ControllerCalls]]
    snapshot: Snapshot | None = None
    """The latest known state; None before the first."""
    known_load: Mapping[str, Any] | None = None
    _controller: ControllerCalls | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None
    _listeners: list[Callable[[Snapshot], None]] = field(default_factory=list)

    def listen(self, listener: Callable[[Snapshot], None]) -> None:
        """Call ``listener`` with every new snapshot, on the event loop."""
        self._listeners.append(listener)

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def wait_change(self, timeout_s: float) -> None:
        """Return at the next new snapshot, or after ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def fresh(self) -> Snapshot | None:
        """The state now, or the last known one if the controller does not answer."""
        if self._controller is not None:
            try:
                snapshot = await asyncio.wait_for(self._controller.snapshot(), CALL_TIMEOUT_S)
                self._accept(snapshot)
            except Exception as err:  # any failure of the actor or of Ray
                logger.warning("no fresh snapshot: %s", err)
        return self.snapshot

    async def placement(self) -> dict[str, Any] | None:
        """The placement; None while the controller does not answer."""
        return await self._ask("placement")

    async def load(self) -> dict[str, Any] | None:
        """The experts' load; None while the controller does not answer."""
        load = await self._ask("load")
        self.known_load = load or self.known_load
        return load

    async def _ask(self, what: Literal["placement", "load"]) -> dict[str, Any] | None:
        controller = self._controller
        if controller is None:
            return None
        call = controller.placement if what == "placement" else controller.load
        try:
            return await asyncio.wait_for(call(), CALL_TIMEOUT_S)
        except Exception as err:  # any failure of the actor or of Ray
            logger.warning("no %s: %s", what, err)
            return None

    def require_controller(self) -> ControllerCalls:
        """The controller. Raises ``NotReadyError`` while there is none."""
        if self._controller is None:
            raise NotReadyError("the controller does not answer", "not_ready", 2.0)
        return self._controller

    async def _follow(self) -> None:
        while True:
            try:
                if self._controller is None:
                    self._controller = await asyncio.wait_for(self.find(), CALL_TIMEOUT_S)
                version = -1 if self.snapshot is None else int(self.snapshot["version"])
                snapshot = await asyncio.wait_for(
                    self._controller.wait_snapshot(version, POLL_TIMEOUT_S),
                    POLL_TIMEOUT_S + CALL_TIMEOUT_S,
                )
                self._accept(snapshot)
            except Exception as err:  # the controller may restart; serving continues meanwhile
                level = logging.DEBUG if self._controller is None else logging.WARNING
                logger.log(level, "the controller does not answer: %r", err)
                self._controller = None
                await asyncio.sleep(_RETRY_S)

    def _accept(self, snapshot: Snapshot) -> None:
        known = -1 if self.snapshot is None else int(self.snapshot.get("term", 0))
        if int(snapshot.get("term", 0)) < known:
            raise NotReadyError(
                f"a controller of the older term {snapshot['term']} is not followed"
            )
        self.snapshot = snapshot
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in self._listeners:
            listener(snapshot)


def drained_workers(snapshot: Snapshot) -> frozenset[str]:
    workers = snapshot.get("workers", ())
    return frozenset(worker["name"] for worker in workers if worker["state"] == "DRAINED")


def attention_endpoints(snapshot: Snapshot) -> list[AttentionEndpoint]:
    """Workers of the current generation that run attention and accept streams."""
    return [
        AttentionEndpoint(
            name=worker["name"],
            address=worker["engine_address"],
            pid=int(worker.get("pid") or 0),
            engine=str(worker["rank"]),
        )
        for worker in snapshot.get("workers", ())
        if runs_attention(worker["role"])
        and worker.get("engine_address")
        and worker["state"] in ("READY", "SERVING")
    ]
