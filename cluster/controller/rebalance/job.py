"""Commands to rebalance, and how decisions are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.controller.parts.operations import Operation, OperationCommand
from cluster.core.load_profile import LoadProfile
from cluster.policy.rebalance import CurrentLoad, RebalanceDecision


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
