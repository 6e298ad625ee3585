"""Drain commands and their progress: plain values that a restarted controller can read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cluster.controller.parts.operations import OperationCommand, OperationState, Timed
from cluster.core.placement import ExpertPlacement
from cluster.core.states import next_state
from cluster.core.topology import Generation
from cluster.planner.stages import SlotFill, Stage


class DrainCommand(OperationCommand, frozen=True, kw_only=True):
    """Which workers to drain."""

    kind = "drain"
    content = ("worker", "node", "force")

    worker: str = ""
    """Name of one worker."""
    node: str = ""
    """Name of a node: all its workers."""
    requested_by: tuple[str, ...] = ()
    """Workers that requested the drain themselves; empty for a client's command."""
    limit_s: float
    """Time in which the workers must have left."""
    force: bool = False
    """After the limit the workers leave in any case."""


class DrainStep(Enum):
    """What a drain waits for; the value is for people."""

    SETTLE = "wait for a running generation"
    COPY = "copy experts to other workers"
    MOVE = "move requests to other workers"
    LEAVE = "form a generation without"
    END = "end the processes"
    BACK = "take it back"


_NEXT = {
    DrainStep.SETTLE: {DrainStep.COPY, DrainStep.MOVE, DrainStep.BACK},
    DrainStep.COPY: {DrainStep.SETTLE, DrainStep.MOVE, DrainStep.BACK},
    DrainStep.MOVE: {DrainStep.SETTLE, DrainStep.LEAVE, DrainStep.BACK},
    DrainStep.LEAVE: {DrainStep.END},
}


@dataclass(kw_only=True, slots=True)
class Drain(Timed):
    """A running drain, as the workers keep it for the next controller."""

    names: tuple[str, ...]
    command: DrainCommand
    removes_places: bool = False
    """The cluster is scaled down: no workers start in the places of these."""
    step: DrainStep = DrainStep.SETTLE
    before: ExpertPlacement | None = None
    """The maps from before the drain; None if it has changed none."""
    copied_in: int = 0
    """Generation of those maps: until it ends the workers hold what they name."""
    outcome: tuple[OperationState, str] | None = None
    """How and why the drain ends once it is undone."""

    @property
    def workers(self) -> str:
        """Its workers, for people."""
        return " and ".join(self.names)

    def enter(self, step: DrainStep) -> None:
        """Begin the next step."""
        self.resume(next_state(self.step, step, _NEXT))

    def resume(self, step: DrainStep) -> None:
        """Begin, or go on for an earlier controller, with this step."""
        self.step = step
        self.operation.phase = step.value
        self.operation.progress = list(DrainStep).index(step) / len(DrainStep)

    def way_back(self, now: ExpertPlacement, generation: Generation) -> Stage | None:
        """From the maps in force to those from before the drain; None if no change is needed."""
        before = self.before
        if before is None or before.banks == now.banks:
            return None
        wanted = _slots(before)
        if {device for _, device, _, _ in wanted} - {m.device for m in generation.experts}:
            return None  # some of them have left
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
    """(bank, device, slot, expert) of every copy."""
    return {
        (bank, device, slot, expert)
        for bank, maps in enumerate(placement.banks)
        for device, slot, expert in maps.copies()
    }
