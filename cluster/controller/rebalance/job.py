"""A rebalancing under way: the decision, its progress, and how both are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.controller.parts.epoch_change import ChangeState, EpochChange
from cluster.controller.parts.operations import Operation, OperationCommand
from cluster.controller.parts.traces import OpenTrace
from cluster.core.load_profile import LoadProfile
from cluster.core.placement import ExpertPlacement
from cluster.planner.stages import is_reached
from cluster.policy.rebalance import CurrentLoad, RebalanceDecision
from cluster.tracing import names


class RebalanceCommand(OperationCommand, frozen=True, kw_only=True):
    """Move experts to where the load is."""

    kind = "rebalance"
    content = ("dry_run",)

    dry_run: bool = False
    """Only report what would be done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Whether to change the placement."""

    load: CurrentLoad
    operation: Operation | None = None
    """The operation of the client that asked, if any."""
    dry_run: bool = False


@dataclass(kw_only=True, slots=True)
class RebalanceJob:
    """A decision that is being carried out, stage by stage."""

    decision: RebalanceDecision
    asked: Question
    began_at: float
    """Monotonic seconds."""
    opened: OpenTrace
    """Its trace."""
    change: EpochChange | None = None
    """The stage under way."""
    num_stages: int = 0
    """Stages that are in force."""
    num_moved: int = 0
    """Slots that were filled."""
    num_bytes: int = 0
    """Bytes that moved."""

    @property
    def phase(self) -> str:
        """Current phase, for people."""
        change = self.change
        if change is None:
            return "plan"
        loads = f" ({change.num_loaded} of {len(change.stage.fills)})"
        is_loading = change.state is ChangeState.LOAD
        return f"stage {self.num_stages + 1}: {change.state.value}{loads if is_loading else ''}"

    def stage_over(self) -> None:
        """Add up the results of the stage that has ended."""
        assert self.change is not None, "a stage was under way"
        self.num_bytes += self.change.num_bytes
        if self.change.state is ChangeState.DONE:
            self.num_stages += 1
            self.num_moved += len(self.change.stage.fills)
        self.change = None

    def summary(self, placement: ExpertPlacement, now: float) -> str:
        """Summary for people; ``placement`` is the result."""
        decision = self.decision
        whole = "" if is_reached(placement, decision.target) else ", as far as the slots allow"
        if self.num_moved > decision.num_moves:  # stages may use a slot before its last expert
            whole += f", {self.num_moved - decision.num_moves} of them on the way"
        return (
            f"filled {self.num_moved} slots in {self.num_stages} epochs ({self.num_bytes} bytes, "
            f"{now - self.began_at:.1f} s){whole}; balancedness "
            f"{percent(decision.balancedness_now)} before, {percent(decision.balancedness_then)} "
            "predicted after it"
        )

    def report(self, outcome: str, text: str, epoch: int, now: float) -> dict[str, Any]:
        """The field ``last`` of rebalancing in ``status``."""
        return {
            "outcome": outcome,
            "text": text,
            "epoch": epoch,
            "slots_moved": self.num_moved,
            "bytes": self.num_bytes,
            "seconds": round(now - self.began_at, 3),
            "balancedness": {
                "before": self.decision.balancedness_now,
                "predicted": self.decision.balancedness_then,
                "achieved": None,
            },
        }

    def attributes(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Of the trace of the ended change; ``report`` as above."""
        return {
            names.OUTCOME: report["outcome"],
            names.PLACEMENT_EPOCH: report["epoch"],
            names.SLOTS: self.num_moved,
            names.BYTES: self.num_bytes,
            names.BALANCEDNESS_BEFORE: self.decision.balancedness_now,
            names.BALANCEDNESS_PREDICTED: self.decision.balancedness_then,
        }


def result_of(decision: RebalanceDecision, dry_run: bool) -> dict[str, Any]:
    """Fields of ``RebalanceResult`` in ``admin.proto``."""
    return {
        "dry_run": dry_run,
        "action": decision.action,
        "slots_to_move": decision.num_moves,
        "bytes_to_move": decision.num_bytes,
        "balancedness_now": decision.balancedness_now or 0.0,
        "balancedness_predicted": decision.balancedness_then or 0.0,
        "step_time_ratio": decision.time_ratio,
        "gain_s": decision.gain_s,
        "cost_s": decision.cost_s,
    }


def describe(decision: RebalanceDecision) -> str:
    """Description of a decision, for people."""
    moves = f"move {decision.num_moves} slots ({decision.num_bytes} bytes)"
    what = moves if decision.action == "move" else "change shares and decode devices only"
    return (
        f"{what}; balancedness {percent(decision.balancedness_now)} now, "
        f"{percent(decision.balancedness_then)} predicted after it"
    )


def answer(decision: RebalanceDecision, asked: Question) -> str:
    """The outcome of an order that changes nothing, for people."""
    would = "a dry run, nothing has changed: would" if asked.dry_run else "not done: would"
    text = f"nothing {'would be' if asked.dry_run else 'is'} done"
    text = text if decision.action == "none" else f"{would} {describe(decision)}"
    return f"{text}: {decision.reason}, {by_load(asked.load.profile)}"


def by_load(profile: LoadProfile) -> str:
    """The load that a plan is for: another load is a reason for another plan."""
    return f"by the load of {profile.tokens} rows"


def percent(value: float | None) -> str:
    """``93.1%``, or ``unknown``."""
    return "unknown" if value is None else f"{100 * value:.1f}%"
