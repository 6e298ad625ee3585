"""Drain commands and their progress: plain values that a restarted controller can read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cluster.controller.operations import OperationCommand, OperationState, TimedOperation
from cluster.core.placement import ExpertPlacement
from cluster.core.states import next_state
from cluster.core.topology import Generation
from cluster.planner.stages import SlotFill, Stage


class DrainCommand(OperationCommand, frozen=True, kw_only=True):
    """Command to drain workers."""

    kind = "drain"
    content = ("worker", "node", "force")

    worker: str = ""
    """Name of a worker; empty for a drain of a node."""
    node: str = ""
    """Name of a node; all its workers are drained."""
    requested_by: tuple[str, ...] = ()
    """Workers that requested the drain themselves; empty for a client's command."""
    limit_s: float
    """Time limit for the workers to leave, in seconds."""
    force: bool = False
    """Whether the workers end at the limit even if they still have requests."""


class DrainStep(Enum):
    """Step of a drain; the value is shown to users."""

    SETTLE = "wait for a running generation"
    COPY = "copy experts to other workers"
    MOVE = "move requests to other workers"
    LEAVE = "form a generation without"
    END = "end the processes"
    BACK = "roll it back"


_NEXT = {
    DrainStep.SETTLE: {DrainStep.COPY, DrainStep.MOVE, DrainStep.BACK},
    DrainStep.COPY: {DrainStep.SETTLE, DrainStep.MOVE, DrainStep.BACK},
    DrainStep.MOVE: {DrainStep.SETTLE, DrainStep.LEAVE, DrainStep.BACK},
    DrainStep.LEAVE: {DrainStep.END},
}


@dataclass(kw_only=True, slots=True)
class Drain(TimedOperation):
    """A running drain; the workers store it for the next controller."""

    names: tuple[str, ...]
    command: DrainCommand
    removes_places: bool = False
    """Whether the cluster is scaled down: the places of these workers are removed."""
    step: DrainStep = DrainStep.SETTLE
    before: ExpertPlacement | None = None
    """The placement before the drain; None if the drain has not changed it."""
    copied_in: int = 0
    """Generation in which the drain copied experts; within it, workers keep the old copies too."""
    outcome: tuple[OperationState, str] | None = None
    """State and message with which the drain ends after it is rolled back."""

    @property
    def workers(self) -> str:
        """Names of its workers, for messages."""
        return " and ".join(self.names)

    def enter(self, step: DrainStep) -> None:
        """Begin the next step."""
        self.resume(next_state(self.step, step, _NEXT))

    def resume(self, step: DrainStep) -> None:
        """Begin this step, or continue it after a restart of the controller."""
        self.step = step
        self.operation.phase = step.value
        self.operation.progress = list(DrainStep).index(step) / len(DrainStep)

    def rollback_placement(self, now: ExpertPlacement, generation: Generation) -> Stage | None:
        """Return the stage from placement ``now`` to ``before``; None if unneeded or impossible."""
        before = self.before
        if before is None or before.banks == now.banks:
            return None
        wanted = _slots(before)
        if {device for _, device, _, _ in wanted} - {m.device for m in generation.experts}:
            return None  # some of its workers have left
        kept = wanted if generation.number == self.copied_in else _slots(now)
        fills = [
            SlotFill(
                bank=bank,
                device=device,
                slot=slot,
                expert=expert,
                sources=now.banks[bank].holders(expert),
            )
            for bank, device, slot, expert in sorted(wanted - kept)
        ]
        return Stage(fills=tuple(fills), placement=before)


def _slots(placement: ExpertPlacement) -> set[tuple[int, int, int, int]]:
    """Return (bank, device, slot, expert) of every copy."""
    return {
        (bank, device, slot, expert)
        for bank, maps in enumerate(placement.banks)
        for device, slot, expert in maps.copies()
    }
