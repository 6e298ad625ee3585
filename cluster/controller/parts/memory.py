"""What a controller leaves to the next one: the workers keep it, as plain data."""

from __future__ import annotations

from typing import Any

from msgspec import field

from cluster.controller.parts.drains import Drain
from cluster.controller.parts.event_log import HistoryEntry
from cluster.controller.parts.operations import Operation
from cluster.core.codec import Message
from cluster.core.placement import ExpertPlacement
from cluster.core.states import WorkerState
from cluster.core.topology import Member
from cluster.policy.places import ClosedPlace


class LostWorker(Message, frozen=True, kw_only=True):
    """A worker that was lost or drained."""

    member: Member
    state: WorkerState
    """Its last state."""
    reason: str


class Memory(Message, frozen=True, kw_only=True):
    """``Cluster.memory`` makes it, ``cluster.controller.failover.restore`` takes it."""

    version: int = 0
    """The snapshot's: of several the newest counts."""
    history: tuple[HistoryEntry, ...] = ()
    """The newest entries."""
    lost: tuple[LostWorker, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    """What the cluster was started with, see ``ControllerActor``."""
    desired: ExpertPlacement | None = None
    """The placement of the whole cluster; None if it is the one in force."""
    closed: dict[str, ClosedPlace] = field(default_factory=dict)
    """Places in which no worker starts."""
    operations: tuple[Operation, ...] = ()
    """The newest."""
    drain: Drain | None = None
    """The drain under way."""
