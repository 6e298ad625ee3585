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
    """Effect: send a frame (control message) to workers; it is lost for disconnected workers."""

    frame: ControlFrame
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Effect: start a worker, which loads its part of the experts in ``placement``."""

    member: Member
    placement: ExpertPlacement
    holders: tuple[ExpertHolder, ...] = ()
    """Workers from which the new worker can read experts, besides the checkpoint."""


@dataclass(frozen=True, slots=True)
class EndWorkers:
    """Effect: end the processes of workers, then call ``Draining.ended``."""

    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReleasePlaces:
    """Effect: release resources that scaling reserved for places, the positions of workers."""

    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EndAllWorkers:
    """Effect: end all workers, then call ``Controller.all_ended``."""


@dataclass(frozen=True, slots=True)
class RecordTrace:
    """Effect: record the trace of a change of the cluster that has just ended."""

    name: str
    seconds: float
    attributes: Mapping[str, Any]
    """Attributes of the trace's span; the value of an unknown attribute is None."""
    error: str = ""
    """Type of the error with which the change ended; empty without an error."""
    span_id: bytes = b""
    """Id of the span, to which gateways link the spans of requests during the change."""


Effect = SendFrame | StartWorker | EndWorkers | ReleasePlaces | EndAllWorkers | RecordTrace
