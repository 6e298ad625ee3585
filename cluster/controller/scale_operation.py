"""Scale commands and their progress, as plain values that a restarted controller can read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cluster.controller.operations import OperationCommand, OperationState, TimedOperation
from cluster.core.placement import ExpertPlacement
from cluster.core.states import next_state


class ScaleCommand(OperationCommand, frozen=True, kw_only=True):
    """Command to set the number of workers of each pool."""

    kind = "scale"
    content = ("attention", "expert", "prefill", "decode")

    attention: int | None = None
    """New number of attention workers; None for no change."""
    expert: int | None = None
    """New number of expert workers, in colocated mode of all workers; None for no change."""
    prefill: int | None = None
    """New number of attention workers that compute prompts; None for no change."""
    decode: int | None = None
    """New number of attention workers that decode; None for no change."""
    cause: str = ""
    """Reason of a command of the node follower; empty for other commands."""
    nodes: frozenset[str] = frozenset()
    """Ids of the new nodes if the node follower scales for them; otherwise empty."""
    limit_s: float
    """Time limit, in seconds, for new workers to serve, and then for removed workers to leave."""


class ScaleStep(Enum):
    """Step of a scale operation, before surplus workers leave; the value is shown to users."""

    SETTLE = "wait for a running generation"
    START = "start workers"
    JOIN = "form a generation with them"


_NEXT = {
    ScaleStep.SETTLE: {ScaleStep.START},
    ScaleStep.START: {ScaleStep.JOIN},
    ScaleStep.JOIN: {ScaleStep.START},  # a worker was lost, and the generation could not be formed
}


@dataclass(kw_only=True, slots=True)
class Scale(TimedOperation):
    """State of a scale operation until all new workers serve; stored for the next controller."""

    command: ScaleCommand
    step: ScaleStep = ScaleStep.SETTLE
    added: tuple[str, ...] = ()
    """Names of the places (positions for workers) that the scaling has added."""
    before: ExpertPlacement | None = None
    """The desired placement without the new places; None before they are added."""
    prefill_before: int = 0
    """Number of prefill workers before the scaling; 0 without step groups."""
    outcome: tuple[OperationState, str] | None = None
    """Final state and reason of an aborted scaling, which is to be rolled back; None otherwise."""

    def enter(self, step: ScaleStep) -> None:
        """Begin the next step of the scaling. Raises ``IllegalTransitionError``."""
        self.resume(next_state(self.step, step, _NEXT))

    def resume(self, step: ScaleStep) -> None:
        """Begin a step of the scaling, or continue it after a restart of the controller."""
        self.step = step
        self.operation.phase = step.value
        self.operation.progress = list(ScaleStep).index(step) / (len(ScaleStep) + 1)
