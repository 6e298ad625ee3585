"""Rebalancing policy: decides whether to change the placement, and to which one. Pure.

There are two kinds of changes: new split weights and decode devices alone, which move no experts,
and moves of single experts within the budget. With the times of experts (``cluster.sizing.replay``)

    gain of a second  = 1 - time after / time now
    cost              = most bytes into a device / rate x _MOVE_SLOWDOWN + stages x _SWITCH_S

The change with the largest ``gain x horizon - cost`` > 0 is made if its gain is >= _LEAST_GAIN.
A change that gives a step group with devices of its own the experts that it lacks takes precedence,
whatever it gains; so does one that leaves fewer experts with all copies in one failure domain, as
recovery from the loss of a domain reads the experts at risk from disk.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from cluster.config.cluster import ClusterConfig
from cluster.config.expert_load import RebalanceSection
from cluster.core.group_placement import is_apart
from cluster.core.load_profile import LoadProfile
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import StepGroup
from cluster.load.view import balancedness_of, expected_loads
from cluster.planner import decode_moves, mesh
from cluster.planner.assess import assess
from cluster.planner.base import Plan, PlannedTopology, PlanOptions
from cluster.planner.groups import num_incomplete, plan_groups
from cluster.sizing.replay import ExpertStepCost, simulate_window

Action = Literal["none", "split", "move"]
_MOVE_SLOWDOWN = 0.1
"""Assumed share of throughput that is lost while expert weights move between devices."""
_SWITCH_S = 0.05
"""Assumed seconds for a new epoch: a message to all workers and, at worst, an empty step."""
_LEAST_GAIN = 0.015
"""Smallest predicted gain, as a share of the step time, for which the placement changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurrentLoad:
    """Load of the experts for which a rebalancing decision is made."""

    profile: LoadProfile
    """Tokens that each logical expert of each bank computed."""
    prefill_share: float
    """Share of the load that comes from prompt rows, 0 to 1; the rest comes from decode rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceDecision:
    """Decision whether and how to change the placement of experts, with the predicted effect.

    For ``action`` ``none``, the effect is that of the best change, which was rejected.
    """

    action: Action
    """``none``; ``split``: change split weights and decode devices; ``move``: move experts too."""
    reason: str
    """Reason of the decision, as a text for operators."""
    target: ExpertPlacement
    """Placement to change to; the current placement if ``action`` is ``none``."""
    num_moves: int
    """Number of expert slots that the change fills with other experts."""
    num_bytes: int
    """Bytes of expert weights that the change moves."""
    balancedness_now: float | None
    """Balancedness (mean load over largest load of devices) before the change; None if unknown."""
    balancedness_then: float | None
    """Predicted balancedness (mean load over largest load) after the change; None if unknown."""
    time_ratio: float
    """Predicted time of the experts' work after the change, divided by the time now."""
    gain_s: float
    """Seconds of work that the change is predicted to save within ``horizon_s``."""
    cost_s: float
    """Seconds of work that the change itself is predicted to cost."""


def why_impossible(config: ClusterConfig, num_expert_workers: int) -> str:
    """Return the reason why a cluster cannot be rebalanced; empty if it can be."""
    workers = config.workers
    if workers.mode == "local":
        return "one worker holds all experts (--mode local)"
    if num_expert_workers < 2:
        return "there is one expert worker (--num-expert-workers)"
    if not workers.num_redundant_experts + workers.recovery_slots:
        return "there are no spare expert slots (--num-redundant-experts)"
    return ""


def decide_placement(
    load: CurrentLoad,
    topology: PlannedTopology,
    current: ExpertPlacement,
    section: RebalanceSection,
    step: ExpertStepCost,
) -> RebalanceDecision:
    """Decide whether to change the placement, and to which placement. Deterministic.

    ``step`` is the cost of a step on an expert worker; ``section`` has the limits of moves and the
    horizon. Raises ``ConfigError`` if load, devices and placement do not match.
    """
    scales = _CandidateEvaluator(load, topology, current.packed(), section, step)
    time_now = scales.seconds(scales.current)
    found = [scales.weighed(plan, time_now) for plan in scales.candidates()]
    best = max(found, key=lambda d: (-scales.num_at_risk(d.target), d.gain_s - d.cost_s))
    if num_incomplete(topology, scales.current) > num_incomplete(topology, best.target):
        return replace(best, reason="each step group gets all experts on its own devices")
    num_spread = scales.num_at_risk(scales.current) - scales.num_at_risk(best.target)
    if num_spread > 0:
        return replace(best, reason=f"{num_spread} experts get a copy in a second failure domain")
    if best.gain_s <= best.cost_s or 1.0 - best.time_ratio < _LEAST_GAIN:
        reason = f"{best.gain_s:.2f} s won within {section.horizon_s:g} s, {best.cost_s:.2f} s lost"
        return replace(best, action="none", reason=reason, target=current, num_moves=0, num_bytes=0)
    return best


def mixed_balancedness(placement: ExpertPlacement, load: CurrentLoad) -> float | None:
    """Return the balancedness of a placement under a load of prompts and decodes; None if no load.

    Prompt rows are divided by split weights, and decode rows go to the decode device. With devices
    of their own, the result is the weighted mean of both step groups.
    """
    by_share = expected_loads(placement, load.profile, "prefill")
    by_table = expected_loads(placement, load.profile, "decode")
    part = load.prefill_share
    if not any(map(is_apart, placement.banks)):
        pairs = (zip(by_share[key], by_table[key], strict=True) for key in by_share)
        return balancedness_of([[part * p + (1.0 - part) * d for p, d in each] for each in pairs])
    found = [balancedness_of([*loads.values()]) or 0.0 for loads in (by_share, by_table)]
    return part * found[0] + (1.0 - part) * found[1]


@dataclass(frozen=True, slots=True)
class _CandidateEvaluator:
    """Plans candidate changes of the placement for one load, and evaluates them."""

    load: CurrentLoad
    topology: PlannedTopology
    current: ExpertPlacement
    section: RebalanceSection
    step: ExpertStepCost

    def candidates(self) -> list[Plan]:
        """Plan the candidates: split weights alone; moves for prompts, for decodes, for both."""
        rows, profile, topology = self.step.decode_tokens, self.load.profile, self.topology
        still = PlanOptions(max_move_fraction=0.0, decode_tokens=rows)
        plans = [mesh.plan(profile, topology, self.current, still)]
        moving = replace(still, max_move_fraction=self.section.max_move_fraction)
        budget = mesh.move_budget(self.current, moving)
        if not budget:
            return plans
        plans.append(mesh.plan(profile, topology, self.current, moving))
        for plan in tuple(plans):
            moved = self._for_decodes(plan, budget - len(plan.moves))
            solved = mesh.plan(profile, topology, moved, still).placement
            plans.append(assess(profile, topology, solved, self.current))
        return plans

    def _for_decodes(self, plan: Plan, budget: int) -> ExpertPlacement:
        """Return the placement of ``plan`` with moves for decodes."""

        def improved(
            group: StepGroup, topology: PlannedTopology, placement: ExpertPlacement | None
        ) -> ExpertPlacement:
            assert placement is not None
            if group == "prefill":
                return placement
            return decode_moves.improved(
                self.load.profile,
                topology,
                placement,
                budget=budget,
                rows=self.step.decode_tokens,
                slot_tokens=self.step.slot_s / max(self.step.token_s, 1e-12),
            )

        apart = plan_groups(self.topology, plan.placement, improved)
        return improved("", self.topology, plan.placement) if apart is None else apart

    def weighed(self, plan: Plan, time_now: float) -> RebalanceDecision:
        time_then = self.seconds(plan.placement)
        ratio = time_then / time_now if time_now > 0 else 1.0
        into_device = Counter(move.device for move in plan.moves)
        most_bytes = max(into_device.values(), default=0) * self.step.expert_bytes
        stages = 3 if plan.moves else 1
        return RebalanceDecision(
            action="move" if plan.moves else "split",
            reason="the gain exceeds the cost",
            target=plan.placement,
            num_moves=len(plan.moves),
            num_bytes=len(plan.moves) * self.step.expert_bytes,
            balancedness_now=mixed_balancedness(self.current, self.load),
            balancedness_then=mixed_balancedness(plan.placement, self.load),
            time_ratio=ratio,
            gain_s=max(1.0 - ratio, 0.0) * self.section.horizon_s,
            cost_s=most_bytes / self.section.bytes_per_s * _MOVE_SLOWDOWN + stages * _SWITCH_S,
        )

    def num_at_risk(self, placement: ExpertPlacement) -> int:
        """Return the number of experts that lack a possible copy in a second failure domain."""
        return mesh.num_at_risk(self.load.profile, self.topology, placement)

    def seconds(self, placement: ExpertPlacement) -> float:
        """Return the predicted time of the experts' work for one row, in seconds.

        The row stands for the load's mix of prompt and decode rows.
        """
        window = simulate_window(self.load.profile, self.topology, placement, self.step)
        prefill = window.prefill_step_s / self.step.prefill_tokens
        decode = window.decode_step_s / self.step.decode_tokens
        return self.load.prefill_share * prefill + (1.0 - self.load.prefill_share) * decode
