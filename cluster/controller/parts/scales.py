"""Scaling commands and their progress: plain values that a restarted controller can read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cluster.controller.parts.operations import OperationCommand, OperationState, Timed
from cluster.core.placement import ExpertPlacement
from cluster.core.states import next_state


class ScaleCommand(OperationCommand, frozen=True, kw_only=True):
    """How many workers there shall be."""

    kind = "scale"
    content = ("attention", "expert")

    attention: int | None = None
    """Attention workers; None leaves their number as it is."""
    expert: int | None = None
    """Expert workers, in colocated mode all workers; None leaves their number as it is."""
    cause: str = ""
    """Why the cluster scales itself; empty for a client's command."""
    nodes: frozenset[str] = frozenset()
    """Ids of the nodes that it is for, where the cluster scales itself as they come."""
    limit_s: float
    """Time in which new workers must serve, and then again time in which others must have left."""


class ScaleStep(Enum):
    """What a scaling waits for before workers leave; the value is for people."""

    SETTLE = "wait for a running generation"
    START = "start workers"
    JOIN = "form a generation with them"


_NEXT = {
    ScaleStep.SETTLE: {ScaleStep.START},
    ScaleStep.START: {ScaleStep.JOIN},
    ScaleStep.JOIN: {ScaleStep.START},  # a worker was lost, and the generation could not be formed
}


@dataclass(kw_only=True, slots=True)
class Scale(Timed):
    """A scaling that starts workers, as the workers keep it for the next controller."""

    command: ScaleCommand
    step: ScaleStep = ScaleStep.SETTLE
    added: tuple[str, ...] = ()
    """Places that are new."""
    before: ExpertPlacement | None = None
    """The desired placement without them; None before they are added."""
    outcome: tuple[OperationState, str] | None = None
    """How and why it ends, once it is given up."""

    def enter(self, step: ScaleStep) -> None:
        """Begin the next step."""
        self.resume(next_state(self.step, step, _NEXT))

    def resume(self, step: ScaleStep) -> None:
        """Begin, or go on for an earlier controller, with this step."""
        self.step = step
        self.operation.phase = step.value
        self.operation.progress = list(ScaleStep).index(step) / (len(ScaleStep) + 1)
