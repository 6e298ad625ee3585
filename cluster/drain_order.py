"""What is to be drained, and how far that is: plain values that a restarted controller can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from cluster.epoch_change import EpochChange
from cluster.errors import RequestError
from cluster.operations import Operation, OperationState
from cluster.placement import FREE_SLOT, ExpertPlacement
from cluster.planner.stages import SlotFill, Stage
from cluster.topology import Generation


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainOrder:
    """What is to be drained."""

    worker: str = ""
    """One worker, or"""
    node: str = ""
    """all of a node."""
    limit_s: float
    """Time in which the workers must have left."""
    force: bool = False
    """Past the limit they leave all the same."""
    request_id: str = ""
    """Begins one operation, however often it is given."""
    expected_epoch: int | None = None
    """Placement epoch that must be in force."""

    @property
    def asked(self) -> str:
        """What is to be done, for ``Operation.asked``."""
        return f"worker {self.worker}, node {self.node}, force {self.force}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DrainOrder:
        """From plain data. Raises ``RequestError`` for what is no order."""
        known = {f.name for f in fields(cls)}
        if set(data) - known or "limit_s" not in data:
            raise RequestError(f"not a drain order: {sorted(data)}")
        return cls(**data)


class DrainStep(Enum):
    """What a drain waits for; the value is for people."""

    SETTLE = "wait for a running generation"
    COPY = "copy experts to other workers"
    MOVE = "move requests to other workers"
    LEAVE = "form a generation without"
    END = "end the processes"
    BACK = "take it back"


@dataclass(kw_only=True, slots=True)
class Drain:
    """A drain that runs."""

    operation: Operation
    """What it is to others."""
    names: tuple[str, ...]
    """The workers."""
    order: DrainOrder
    """As it was given."""
    deadline: float
    """Monotonic time at which it is taken back."""
    step: DrainStep = DrainStep.SETTLE
    """How far it is."""
    before: ExpertPlacement | None = None
    """The maps from before it; None while it has changed none."""
    copied_in: int = 0
    """Generation of those maps: up to its end the workers hold what they name."""
    change: EpochChange | None = None
    """The change of the maps that is under way."""
    outcome: tuple[OperationState, str] | None = None
    """How it ends once it is taken back, and why."""

    def enter(self, step: DrainStep) -> None:
        """The next step begins."""
        self.step = step
        self.operation.phase = step.value
        self.operation.progress = list(DrainStep).index(step) / len(DrainStep)

    def way_back(self, now: ExpertPlacement, generation: Generation) -> Stage | None:
        """From the maps in force to those from before; None where there is none, or no need."""
        before = self.before
        if before is None or before.banks == now.banks:
            return None
        wanted = _slots(before)
        if {device for _, device, _, _ in wanted} - {m.device for m in generation.experts}:
            return None  # some of them have gone
        kept = wanted if generation.number == self.copied_in else _slots(now)
        fills = [
            SlotFill(bank=bank, device=device, slot=slot, expert=expert, sources=sources)
            for bank, device, slot, expert in sorted(wanted - kept)
            for sources in [_holders(now, bank, expert)]
        ]
        return Stage(fills=tuple(fills), placement=before)

    def to_dict(self) -> dict[str, Any]:
        """Plain data. The deadline follows from when the operation began."""
        return {
            "operation": self.operation.id,
            "names": list(self.names),
            "order": asdict(self.order),
            "step": self.step.name,
            "copied_in": self.copied_in,
            "before": None if self.before is None else self.before.to_dict(),
            "outcome": None if self.outcome is None else [self.outcome[0].value, self.outcome[1]],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], operation: Operation, deadline: float) -> Drain:
        """Inverse of ``to_dict``, but for the change that was under way."""
        before, outcome = data["before"], data["outcome"]
        return cls(
            operation=operation,
            names=tuple(data["names"]),
            order=DrainOrder.from_dict(data["order"]),
            deadline=deadline,
            step=DrainStep[data["step"]],
            copied_in=int(data["copied_in"]),
            before=None if before is None else ExpertPlacement.from_dict(before),
            outcome=None if outcome is None else (OperationState(outcome[0]), str(outcome[1])),
        )


def _slots(placement: ExpertPlacement) -> set[tuple[int, int, int, int]]:
    """(bank, device, slot, expert) of every copy."""
    return {
        (bank, device, slot, expert)
        for bank, maps in enumerate(placement.banks)
        for device, row in enumerate(maps.physical_to_logical)
        for slot, expert in enumerate(row)
        if expert != FREE_SLOT
    }


def _holders(placement: ExpertPlacement, bank: int, expert: int) -> tuple[int, ...]:
    return tuple(device for device, _ in placement.banks[bank].logical_to_physical(expert))
