"""Simulates a recorded load that changes, to compare rebalancing policies without a cluster.

A trace is a list of load profiles, one for each window of time. Each window runs with the placement
that was planned from the previous window, because a real cluster knows a load only afterwards.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from cluster.core.checks import check, check_each, is_at_least_1
from cluster.core.errors import ConfigError
from cluster.core.load_profile import LoadProfile
from cluster.core.placement import ExpertPlacement
from cluster.planner import cost, eplb, mesh
from cluster.planner.assess import placed_groups
from cluster.planner.base import Floats, Plan, PlannedTopology, PlanOptions, relative_speeds

Policy = Literal["never", "eplb", "mesh"]
"""Rebalancing policy: ``never`` keeps the plan that mesh makes for the first window; ``eplb`` and
``mesh`` replan every window.
"""
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertStepCost:
    """Cost of a device's experts in one layer, and the bytes of an expert that moves."""

    slot_s: float = 10e-6
    """Seconds to read the weights of one activated expert slot."""
    token_s: float = 35e-9
    """Seconds to compute one (token, expert) pair."""
    expert_bytes: int = 34_603_008
    prefill_tokens: int = 8192
    """Number of tokens in a prefill step, over all attention ranks."""
    decode_tokens: int = 256
    """Number of rows in a decode step, over all attention ranks."""

    def __post_init__(self) -> None:
        rule = "must be finite and not negative"
        check_each(self, "slot_s token_s", lambda value: 0 <= value < math.inf, rule)
        counts = "expert_bytes prefill_tokens decode_tokens"
        check_each(self, counts, is_at_least_1, "must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedWindow:
    """Predicted costs of one time window of a trace under one rebalancing policy."""

    balancedness: float
    """Balancedness of the placement for the window's own load, averaged over banks."""
    prefill_step_s: float
    """Predicted seconds of expert computation in a prefill step, over all layers."""
    decode_step_s: float
    """Predicted seconds of expert computation in a decode step, over all layers."""
    slots_moved: int
    """Number of expert slots that changed before this window."""
    bytes_moved: int
    """Bytes of the experts that moved into the changed slots before this window."""


def load_trace(path: Path) -> list[LoadProfile]:
    """Read a file with one load profile per line. Raises ``ConfigError`` with the invalid line."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as err:
        raise ConfigError("trace", path.name, f"cannot be read: {err}") from err
    profiles = []
    for number, line in enumerate(lines, start=1):
        try:
            profiles.append(LoadProfile.from_dict(json.loads(line)))
        except (ValueError, RecursionError, ConfigError) as err:
            rule = f"line {number} is not a load profile: {err}"
            raise ConfigError("trace", path.name, rule) from err
    return profiles


def simulate(
    trace: Sequence[LoadProfile],
    topology: PlannedTopology,
    policy: Policy,
    step: ExpertStepCost,
    max_move_fraction: float = 0.05,
) -> list[SimulatedWindow]:
    """Simulate ``trace`` under a rebalancing policy; return each window's predicted costs.

    The first window is only used for planning and has no result. Raises ``ConfigError`` for fewer
    than two windows or windows of different models.
    """
    check(len(trace) >= 2, "trace", len(trace), "must have at least 2 windows")
    shapes = {profile.shape() for profile in trace}
    check(len(shapes) == 1, "trace", len(shapes), "must be of one model: top_k, banks, experts")
    replan = _make_planner(policy, topology, step, max_move_fraction)
    plan = replan(trace[0], None)
    windows = []
    moved = 0
    for number, (before, now) in enumerate(itertools.pairwise(trace)):
        if number > 0 and policy != "never":
            plan = replan(before, plan.placement)
            moved = len(plan.moves)
        windows.append(simulate_window(now, topology, plan.placement, step, moved))
    return windows


def _make_planner(
    policy: Policy, topology: PlannedTopology, step: ExpertStepCost, max_move_fraction: float
) -> Callable[[LoadProfile, ExpertPlacement | None], Plan]:
    if policy == "eplb":
        return lambda load, current: eplb.plan(load, topology, current)
    rows = step.decode_tokens
    first = PlanOptions(decode_tokens=rows)
    later = PlanOptions(decode_tokens=rows, max_move_fraction=max_move_fraction)
    return lambda load, current: mesh.plan(
        load, topology, current, first if current is None else later
    )


def simulate_window(
    load: LoadProfile,
    topology: PlannedTopology,
    placement: ExpertPlacement,
    step: ExpertStepCost,
    moved: int = 0,
) -> SimulatedWindow:
    """Return the predicted cost of a window: for each bank, the slowest device counts.

    ``moved`` is the number of expert slots that changed before the window.
    """
    balance, prefill_s, decode_s = 0.0, 0.0, 0.0
    for group in placed_groups(load, topology, placement, "placement"):
        speeds = group.speeds
        balance += float(cost.balancedness(group.slot_loads, speeds).sum())
        prefill_s += _prefill_s(group.slot_loads, speeds, load.top_k, step)
        active = cost.activation(group.load, load.top_k, step.decode_tokens)
        peaks = cost.expected_peak(active, group.primary, group.decode_speeds)
        tokens = np.zeros((len(group.loads), len(speeds)))
        np.add.at(tokens, (np.arange(len(tokens))[:, None], group.primary), group.load)
        pairs = float(tokens.max(1).sum()) * load.top_k * step.decode_tokens
        decode_s += step.slot_s * float(peaks.sum()) + step.token_s * pairs
    return SimulatedWindow(
        balancedness=balance / len(load.banks),
        prefill_step_s=prefill_s,
        decode_step_s=decode_s,
        slots_moved=moved,
        bytes_moved=moved * step.expert_bytes,
    )


def _prefill_s(slot_loads: Floats, speeds: Floats, top_k: int, step: ExpertStepCost) -> float:
    """Return the seconds of the slowest device, summed over banks; ``speeds`` are relative."""
    active = (1.0 - (1.0 - np.minimum(slot_loads * top_k, 1.0)) ** step.prefill_tokens).sum(2)
    tokens = slot_loads.sum(2) * top_k * step.prefill_tokens
    seconds = (step.slot_s * active + step.token_s * tokens) / relative_speeds(speeds)
    return float(seconds.max(1).sum())
