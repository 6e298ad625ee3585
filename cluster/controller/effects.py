"""Effects: requests of the controller's state machine for actions outside it.

The parts of the controller only change the cluster's state and add effects to it. The controller
actor passes an event, takes the effects (``Cluster.take_effects``) and carries them out in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.core.frames import ControlFrame
from cluster.core.holders import ExpertHolder
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Member


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Send a frame to workers; it is dropped for workers that are not connected."""

    frame: ControlFrame
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker, which loads its part of ``placement``."""

    member: Member
    placement: ExpertPlacement
    holders: tuple[ExpertHolder, ...] = ()
    """Workers from which it can read experts, besides the checkpoint."""


@dataclass(frozen=True, slots=True)
class EndWorkers:
    """End the processes of workers, then call ``Draining.ended``."""

    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReleasePlaces:
    """Release the resources reserved for places that a scale operation had added."""

    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EndAllWorkers:
    """End all workers, then call ``Controller.all_ended``."""


@dataclass(frozen=True, slots=True)
class RecordTrace:
    """Record a change that has just ended."""

    name: str
    seconds: float
    attributes: Mapping[str, Any]
    """Attributes of the span; an unknown value is None."""
    error: str = ""
    """Type of the error; empty if there was none."""
    span_id: bytes = b""
    """Id of the span, see ``ChangeTraces``."""


Effect = SendFrame | StartWorker | EndWorkers | ReleasePlaces | EndAllWorkers | RecordTrace
