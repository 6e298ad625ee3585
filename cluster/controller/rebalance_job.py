"""Commands to rebalance experts, and texts that describe rebalancing decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.controller.operations import Operation, OperationCommand
from cluster.core.load_profile import LoadProfile
from cluster.policy.rebalance import CurrentLoad, RebalanceDecision


class RebalanceCommand(OperationCommand, frozen=True, kw_only=True):
    """Command to move experts so that the load is balanced."""

    kind = "rebalance"
    content = ("dry_run",)

    dry_run: bool = False
    """Whether to only report the decision; no expert moves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceQuery:
    """Input of a decision whether to change the placement of experts."""

    load: CurrentLoad
    operation: Operation | None = None
    """Operation of the client's command; None for an automatic decision."""
    dry_run: bool = False


def result_of(decision: RebalanceDecision, dry_run: bool) -> dict[str, Any]:
    """Convert a decision to the fields of the message ``RebalanceResult`` in ``admin.proto``."""
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
    """Describe the moves and the balancedness of a decision in one line, for operators."""
    moves = f"move {decision.num_moves} slots ({decision.num_bytes} bytes)"
    what = moves if decision.action == "move" else "change shares and decode devices only"
    return (
        f"{what}; balancedness {percent(decision.balancedness_now)} now, "
        f"{percent(decision.balancedness_then)} predicted after it"
    )


def answer(decision: RebalanceDecision, asked: RebalanceQuery) -> str:
    """Describe the outcome of a rebalance command that changed nothing: decision, reason, load."""
    would = "a dry run, nothing has changed: would" if asked.dry_run else "not done: would"
    text = f"nothing {'would be' if asked.dry_run else 'is'} done"
    text = text if decision.action == "none" else f"{would} {describe(decision)}"
    return f"{text}: {decision.reason}, {by_load(asked.load.profile)}"


def by_load(profile: LoadProfile) -> str:
    """Describe the load on which a plan is based, as ``by the load of 1000 rows``."""
    return f"by the load of {profile.tokens} rows"


def percent(value: float | None) -> str:
    """Format a fraction as a percentage, such as ``93.1%``; ``unknown`` for None."""
    return "unknown" if value is None else f"{100 * value:.1f}%"
