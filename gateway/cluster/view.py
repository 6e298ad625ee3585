"""The gateway's view of the cluster: the controller's latest snapshot, updated by long-polling.

Independent of Ray: ``gateway.cluster.client`` implements ``ControllerCalls`` with Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.core.errors import ExpertMeshError, HandshakeError, NotReadyError
from cluster.core.frames import LowDisk
from cluster.core.release import RELEASE, check_release
from cluster.core.topology import runs_attention

logger = logging.getLogger(__name__)

POLL_TIMEOUT_S = 10.0
"""Longest time in seconds for which the controller holds one long-poll of a gateway."""
CALL_TIMEOUT_S = 2.0
"""Default time limit in seconds for a call to the controller."""
_REPORTS_S = (1.0, 2.0, 5.0, 20.0, 60.0)
"""Seconds to wait before each of the reports of stream pauses that follow a new generation."""
_LEAVE_LIMIT_S = 0.5
_RETRY_S = 0.2

Snapshot = Mapping[str, Any]
"""State of the cluster: the result of the controller's ``snapshot``."""


ControllerCall = Literal[
    "snapshot",
    "wait_snapshot",
    "gateway_leaves",
    "streams_paused",
    "exchange_counts",
    "placement",
    "load",
    "numbers",
    "begin",
    "operation",
    "operations",
    "cancel_operation",
    "log",
]
"""Methods of ``cluster.actors.controller_actor.ControllerActor`` that a gateway calls."""


class ControllerCalls(Protocol):
    """Calls the controller on behalf of a gateway."""

    async def call(self, call: ControllerCall, *details: Any) -> Any:
        """Call a method of the controller and return its plain data. Raises the method's errors
        (``ConflictError``, ``UnknownNameError`` and others), or any error if the controller cannot
        be reached."""


@dataclass(frozen=True, slots=True)
class AttentionEndpoint:
    """Address and state of one attention worker."""

    name: str
    address: str
    """``host:port`` of the worker's engine stream."""
    pid: int
    """Process id of the worker. An endpoint with another pid is another worker."""
    engine: str = ""
    """Rank among the attention workers, as text for the ``engine`` label of metrics."""
    is_leaving: bool = field(default=False, compare=False)
    """Whether the worker is being drained; its requests then move to other workers."""
    lacks: frozenset[str] = field(default=frozenset(), compare=False)
    """Keys of adapters that the worker could not load."""
    node: str = field(default="", compare=False)
    """Host of the worker."""
    group: str = field(default="", compare=False)
    """Step group of the worker: ``prefill``, ``decode``, or empty if there is one group."""


@dataclass(slots=True)
class SnapshotFollower:
    """Keeps ``snapshot``, the state of the cluster, up to date by long-polling the controller.

    Args:
        find: finds the controller; raises if there is none. Called again after each failed poll.
        name: name of this gateway, with which the controller records when the gateway stops
            polling. Empty: the controller does not record this.
        release: release of this gateway. Snapshots of a controller of another release are rejected.
        host: host of this gateway. Each poll sends the host and its nearly full disks,
            ``low_disks``.
    """

    find: Callable[[], Awaitable[ControllerCalls]]
    name: str = ""
    release: str = RELEASE
    host: str = ""
    low_disks: Callable[[], tuple[LowDisk, ...]] = tuple
    adapters: Callable[[], tuple[str, ...]] = tuple
    """Returns the keys of the adapters that this gateway's requests use. Set before ``start``."""
    snapshot: Snapshot | None = None
    """The latest known state of the cluster; None before the first snapshot."""
    known_load: Mapping[str, Any] | None = None
    refusal: str = ""
    """Reason why the latest snapshot was rejected; empty if it was accepted."""
    _controller: ControllerCalls | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None
    _search: asyncio.Future[ControllerCalls] | None = None
    """The pending search for the controller."""
    _listeners: list[Callable[[Snapshot], None]] = field(default_factory=list)

    def listen(self, listener: Callable[[Snapshot], None]) -> None:
        """Register ``listener``, which the event loop calls with every accepted snapshot."""
        self._listeners.append(listener)

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    def stop(self) -> None:
        for task in (self._task, self._search):
            if task is not None:
                task.cancel()

    async def leave(self) -> None:
        """Stop polling the controller, and notify it that this gateway leaves."""
        self.stop()
        with contextlib.suppress(ExpertMeshError):
            await self.call("gateway_leaves", self.name, limit_s=_LEAVE_LIMIT_S)

    async def end(self) -> None:
        """Leave, and keep nothing of a fleet that has ended or is about to end."""
        await self.leave()
        self._listeners.clear()
        self._controller = self.snapshot = None

    async def report_pauses(self, take: Callable[[], tuple[int, float] | None]) -> None:
        """Report pauses of client streams after a new generation to the controller, a few times.

        ``take`` returns a generation and its pause in seconds, or None without a new pause.
        """
        for wait_s in _REPORTS_S:
            await asyncio.sleep(wait_s)
            if (pause := take()) is not None:
                with contextlib.suppress(ExpertMeshError):
                    await self.call("streams_paused", *pause)

    async def wait_change(self, timeout_s: float) -> None:
        """Wait until a snapshot is accepted, at most ``timeout_s`` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def fresh(self) -> Snapshot | None:
        """Return the current state of the cluster, or the last known state if the controller does
        not respond; None if no state is known.
        """
        self._accept_fresh(await self._call_or_log("snapshot", True))
        return self.snapshot

    async def refresh(self) -> None:
        """Update ``snapshot`` and ``known_load``; no effect if the controller does not respond.

        One call to the controller, which collects the stats of all workers, returns both.
        """
        if (numbers := await self._call_or_log("numbers")) is not None:
            self.known_load = numbers["load"]
            self._accept_fresh(numbers["snapshot"])

    def _accept_fresh(self, snapshot: Snapshot | None) -> None:
        try:
            if snapshot is not None:
                self._accept(snapshot)
        except NotReadyError as err:
            logger.log(self._log_level(), "could not use a fresh snapshot: %s", err)

    async def call(
        self, call: ControllerCall, *details: Any, limit_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """Call a method of the controller and return its result.

        Raises the method's errors, and ``NotReadyError`` if the controller is unknown, is rejected
        or does not respond within ``limit_s`` seconds.
        """
        if self._controller is None or self.refusal:
            reason = self.refusal or "the controller does not answer"
            raise NotReadyError(reason, "not_ready", 2.0)
        try:
            return await asyncio.wait_for(self._controller.call(call, *details), limit_s)
        except ExpertMeshError:
            raise
        except Exception as err:  # the actor or Ray failed
            raise NotReadyError("the controller does not answer", "not_ready", 2.0) from err

    async def _call_or_log(self, call: ControllerCall, *details: Any) -> dict[str, Any] | None:
        try:
            return dict(await self.call(call, *details))
        except ExpertMeshError as err:
            logger.log(self._log_level(), "the controller call %s failed: %r", call, err)
            return None

    def _log_level(self) -> int:
        """Log level of a failed call to the controller; DEBUG while no controller is known."""
        return logging.DEBUG if self._controller is None else logging.WARNING

    async def _follow(self) -> None:
        while True:
            try:
                if self._controller is None:
                    self._controller = await self._find()
                version = -1 if self.snapshot is None else int(self.snapshot["version"])
                snapshot = await asyncio.wait_for(
                    self._controller.call(
                        *("wait_snapshot", version, POLL_TIMEOUT_S),
                        *(self.name, self.host, self.low_disks(), self.adapters()),
                    ),
                    POLL_TIMEOUT_S + CALL_TIMEOUT_S,
                )
                self._accept(snapshot)
            except Exception as err:  # the controller may restart; serving continues without it
                logger.log(self._log_level(), "the controller does not answer: %r", err)
                self._controller = None
                await asyncio.sleep(_RETRY_S)

    async def _find(self) -> ControllerCalls:
        """Find the controller. At most one search runs, as Ray may block the search's thread for
        minutes. Raises ``TimeoutError`` if the search does not end within ``CALL_TIMEOUT_S``."""
        if self._search is None:
            self._search = asyncio.ensure_future(self.find())
        done, _ = await asyncio.wait({self._search}, timeout=CALL_TIMEOUT_S)
        if not done:
            raise TimeoutError("Ray does not answer")
        search, self._search = self._search, None
        return search.result()

    def _check_release(self, snapshot: Snapshot) -> None:
        """Raise ``NotReadyError`` if a snapshot is of another expertmesh release; log this once."""
        theirs, me = str(snapshot.get("release", "")), self.name or "the gateway"
        try:
            check_release(theirs, "the controller", self.release, me)
        except HandshakeError as err:
            if str(err) != self.refusal:
                logger.error("the controller's snapshots are rejected: %s", err)
            self.refusal, self._controller = str(err), None
            raise NotReadyError(self.refusal, "not_ready", 2.0) from err
        self.refusal = ""

    def _accept(self, snapshot: Snapshot) -> None:
        self._check_release(snapshot)
        known = -1 if self.snapshot is None else int(self.snapshot.get("term", 0))
        if int(snapshot.get("term", 0)) < known:
            raise NotReadyError(
                f"a controller of the older term {snapshot['term']} is not followed"
            )
        if self.snapshot is not None and int(snapshot["version"]) < int(self.snapshot["version"]):
            return  # a newer snapshot has overtaken this one
        self.snapshot = snapshot
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in self._listeners:
            listener(snapshot)


def live_workers(snapshot: Snapshot) -> frozenset[str]:
    """Return the names of workers that are not lost, including drained and draining workers."""
    workers = snapshot.get("workers", ())
    return frozenset(worker["name"] for worker in workers if worker["state"] != "LOST")


def attention_endpoints(snapshot: Snapshot) -> list[AttentionEndpoint]:
    """Return the running attention workers of a snapshot, including workers being drained."""
    return [
        AttentionEndpoint(
            name=worker["name"],
            address=worker["engine_address"],
            pid=int(worker.get("pid") or 0),
            engine=str(worker["rank"]),
            is_leaving=worker["state"] == "DRAINING",
            node=worker.get("node") or "",
            group=worker.get("group") or "",
            lacks=frozenset(
                adapter["key"]
                for adapter in snapshot.get("adapters", ())
                if worker["name"] in adapter.get("lacking", ())
            ),
        )
        for worker in snapshot.get("workers", ())
        if runs_attention(worker["role"])
        and worker.get("engine_address")
        and worker["state"] in ("READY", "SERVING", "DRAINING")
    ]
