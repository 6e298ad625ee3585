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
    """Name of the worker to drain; empty if ``node`` or ``requested_by`` names the workers."""
    node: str = ""
    """Name of the node to drain, with all its workers; empty if single workers are drained."""
    requested_by: tuple[str, ...] = ()
    """Workers that requested the drain themselves; empty for a client's command."""
    limit_s: float
    """Time limit for the workers to leave, in seconds."""
    force: bool = False
    """Whether the workers leave at the time limit even if they still have requests."""


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
    """State of a running drain, which the workers store for the next controller."""

    names: tuple[str, ...]
    command: DrainCommand
    removes_places: bool = False
    """Whether the drain also removes the places (positions) of its workers."""
    step: DrainStep = DrainStep.SETTLE
    before: ExpertPlacement | None = None
    """The placement before the drain; None if the drain has not changed it."""
    copied_in: int = 0
    """Generation in which the drain copied experts; 0 if it copied none.

    As long as this generation runs, the workers also keep the copies of the earlier placement.
    """
    outcome: tuple[OperationState, str] | None = None
    """State and message with which the rolled back drain ends; None without a rollback."""

    @property
    def workers(self) -> str:
        """Names of the drained workers, as one text for messages."""
        return " and ".join(self.names)

    def enter(self, step: DrainStep) -> None:
        """Begin the next step of the drain. Raises ``IllegalTransitionError``."""
        self.resume(next_state(self.step, step, _NEXT))

    def resume(self, step: DrainStep) -> None:
        """Begin a step of the drain, or continue it after a restart of the controller."""
        self.step = step
        self.operation.phase = step.value
        self.operation.progress = list(DrainStep).index(step) / len(DrainStep)

    def rollback_placement(self, now: ExpertPlacement, generation: Generation) -> Stage | None:
        """Return the stage from placement ``now`` back to the placement before the drain.

        None if the placement has not changed, or if ``generation`` lacks a device of the former
        placement.
        """
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
    """Return (bank, device, slot, expert) of every expert copy in a placement."""
    return {
        (bank, device, slot, expert)
        for bank, maps in enumerate(placement.banks)
        for device, slot, expert in maps.copies()
    }
