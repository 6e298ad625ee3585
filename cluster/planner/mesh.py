"""Our planner: expert load, devices and the current placement in, a placement out.

Without a current placement it fills from scratch (``fill``), arranges homes (``arrange``) and
searches until every bank is balanced (``search``). With one it changes as few slots as do: first
the shares alone (``split``), then single moves within the budget. Decode tables come last, from
the copies that are there (``decode``).

Where it differs from the public algorithm (``eplb``): copies take solved shares and not equal ones,
it starts from what is placed, no two copies share a device, devices may differ, and decode steps
have a table of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.core.checks import check
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.planner import cost, decode, split
from cluster.planner.arrange import arrange
from cluster.planner.assess import PREDICTED_ROWS, banks_of, own_masses
from cluster.planner.base import (
    Bools,
    Floats,
    Ints,
    Move,
    Plan,
    PlannedTopology,
    PlanOptions,
    normalised,
    placed,
    slot_arrays,
)
from cluster.planner.fill import can_use_two_nodes, fill
from cluster.planner.moves import aligned, find_moves
from cluster.planner.peak import lower_peaks
from cluster.planner.proposals import Limits
from cluster.planner.search import Placed, SearchGoal, lacks_nodes, search, solve, spread_over_nodes

Coactivation = Mapping[tuple[str, int], Floats]
"""(bank, layer) -> [num_experts, num_experts], how often a token chooses both experts."""

_FULL_TARGET = 0.998
"""Balancedness at which a placement from scratch needs no further search."""
_LEAST_GAIN = 2e-4
"""Gain in balancedness that is worth a move."""
_LEAST_GAIN_FULL = 5e-5
_WORTH_A_NEW_PLAN = 0.002
"""Gain in balancedness for which a plan from scratch replaces many moves, where these are free."""
_NO_LIMIT = 1 << 40
_EXACT = 1e-6
"""Tolerance of the last split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Banks with equally many experts."""

    loads: tuple[BankLoad, ...]
    load: Floats
    """[num_banks, num_experts] the same, normalised."""
    capacities: Ints
    """[num_devices] slots."""
    limits: Limits
    """Rules to keep."""
    top_k: int
    """Experts a token chooses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """The plan of one group."""

    banks: tuple[BankPlacement, ...]
    """Maps, in the group's order."""
    balancedness: tuple[float, ...]
    """Of each bank."""
    peaks: Mapping[int, float]
    """Rows of a decode step -> slots over the least, mean over the banks."""
    moves: tuple[Move, ...]
    """From the current placement."""


def plan(
    profile: LoadProfile,
    topology: PlannedTopology,
    current: ExpertPlacement | None = None,
    options: PlanOptions | None = None,
    coactivation: Coactivation | None = None,
) -> Plan:
    """The best placement found; with ``current`` within the move budget, and never worse than it.

    The same input gives the same plan. Raises ``ConfigError`` where slots do not suffice or the
    current placement is for other banks or devices.
    """
    options = options or PlanOptions()
    check(bool(profile.banks), "load_profile.banks", "none", "must name at least one bank")
    old = None if current is None else banks_of(profile, current, "current placement")
    budget = _budget(old, options)
    parts = []
    for group in _groups(profile, topology):
        part = _planned(group, old, options, budget, coactivation, topology.nearness)
        budget -= len(part.moves)
        parts.append(part)
    return _joined(profile, 1 if current is None else current.epoch + 1, parts)


def _planned(
    group: _Group,
    old: Mapping[tuple[str, int], BankPlacement] | None,
    options: PlanOptions,
    budget: int,
    coactivation: Coactivation | None,
    nearness: Ints,
) -> _Part:
    moves: tuple[Move, ...] = ()
    if old is None:
        result = _from_scratch(group, options, coactivation)
    else:
        banks = [old[b.bank, b.layer] for b in group.loads]
        before = slot_arrays(banks, group.capacities)
        result = _from_current(group, banks, before, options, budget)
        moves = find_moves(group.loads, before[0], result.slots, nearness)
    balance = cost.balancedness(result.masses, group.limits.speeds)
    shares = split.shares(result.slots, result.masses, group.load.shape[1])
    maps = placed(group.loads, result.slots, shares, result.home, group.capacities)
    return _Part(
        banks=tuple(maps),
        balancedness=tuple(balance.tolist()),
        peaks=_peaks(group, result.home),
        moves=moves,
    )


def _joined(profile: LoadProfile, epoch: int, parts: Sequence[_Part]) -> Plan:
    """All banks in the profile's order."""
    found = {
        (bank.bank, bank.layer): (bank, value)
        for part in parts
        for bank, value in zip(part.banks, part.balancedness, strict=True)
    }
    in_order = [found[b.bank, b.layer] for b in profile.banks]
    return Plan(
        placement=ExpertPlacement(epoch=epoch, banks=tuple(bank for bank, _ in in_order)),
        moves=tuple(move for part in parts for move in part.moves),
        balancedness=tuple(value for _, value in in_order),
        decode_slots_over_floor={
            rows: sum(len(p.banks) * p.peaks[rows] for p in parts) / len(in_order)
            for rows in PREDICTED_ROWS
        },
    )


def _budget(old: Mapping[tuple[str, int], BankPlacement] | None, options: PlanOptions) -> int:
    if old is None or options.max_move_fraction is None:
        return _NO_LIMIT
    slots = sum(len(s) for bank in old.values() for s in bank.physical_to_logical)
    return int(slots * options.max_move_fraction + 1e-9)


def _groups(profile: LoadProfile, topology: PlannedTopology) -> Iterator[_Group]:
    sizes = dict.fromkeys(len(b.counts) for b in profile.banks)
    for experts in sizes:
        banks = tuple(b for b in profile.banks if len(b.counts) == experts)
        capacities = topology.capacities(experts)
        limits = Limits(
            usable=np.arange(int(capacities.max()))[None, :] < capacities[:, None],
            speeds=topology.speeds(experts),
            nodes=topology.domains,
            two_nodes=can_use_two_nodes(np.minimum(capacities, experts), topology.domains, experts),
        )
        yield _Group(
            loads=banks,
            load=normalised([b.counts for b in banks]),
            capacities=capacities,
            limits=limits,
            top_k=profile.top_k,
        )


def _from_scratch(group: _Group, options: PlanOptions, coactivation: Coactivation | None) -> Placed:
    limits = group.limits
    slots, home = fill(group.load, group.capacities, limits.speeds, limits.nodes, limits.two_nodes)
    weight = decode.weights(group.load, group.top_k, options.decode_tokens)
    affinity = _affinity(group, coactivation)
    slots, home = arrange(slots, home, group.load, weight, limits.speeds, affinity)
    start = Placed(slots=slots, home=home, masses=solve(slots, group.load, limits.speeds))
    goal = SearchGoal(
        target=_FULL_TARGET, least_gain=_LEAST_GAIN_FULL, budget=_NO_LIMIT, per_move=False
    )
    found = _finished(group, search(start, group.load, limits, goal), options)
    if affinity is not None:  # exchanges would part them again
        return found
    return lower_peaks(found, group.load, limits, group.top_k, options.decode_tokens)


def _affinity(group: _Group, coactivation: Coactivation | None) -> Floats | None:
    """[num_banks, num_experts, num_experts] symmetric, each summing to 1; None when unknown."""
    if coactivation is None:
        return None
    experts = group.load.shape[1]
    result = np.zeros((len(group.loads), experts, experts))
    for b, load in enumerate(group.loads):
        pairs = np.asarray(coactivation.get((load.bank, load.layer), result[b]), dtype=np.float64)
        rule = f"must be square with {experts} experts"
        check(pairs.shape == (experts, experts), "coactivation", pairs.shape, rule)
        pairs = pairs + pairs.T
        np.fill_diagonal(pairs, 0.0)
        result[b] = pairs / max(float(pairs.sum()), 1e-300)
    return result


def _from_current(
    group: _Group,
    banks: Sequence[BankPlacement],
    before: tuple[Ints, Ints],
    options: PlanOptions,
    budget: int,
) -> Placed:
    limits = group.limits
    slots, home = before
    old = Placed(slots=slots, home=home, masses=own_masses(banks, slots, group.load))
    start = _better(group, Placed(slots=slots, home=home, masses=_solved(group, slots)), old)
    start, used = spread_over_nodes(start, group.load, limits, budget)
    is_free = options.max_move_fraction is None
    goal = SearchGoal(
        target=max(_FULL_TARGET if is_free else 0.0, options.target_balancedness),
        least_gain=_LEAST_GAIN,
        budget=budget - used,
        per_move=True,
    )
    result = search(start, group.load, limits, goal)
    if is_free:
        fresh = _from_scratch(group, options, None)
        gain = cost.balancedness(fresh.masses, limits.speeds)
        gain = gain - cost.balancedness(result.masses, limits.speeds)
        lacks = lacks_nodes(result.slots, limits, group.load.shape[1])
        result = _mixed(group, result, fresh, (gain > _WORTH_A_NEW_PLAN) | lacks, slots)
    return _finished(group, result, options)


def _solved(group: _Group, slots: Ints) -> Floats:
    return solve(slots, group.load, group.limits.speeds)


def _better(group: _Group, new: Placed, old: Placed) -> Placed:
    """For each bank the better balanced one."""
    speeds = group.limits.speeds
    is_new = cost.balancedness(new.masses, speeds) >= cost.balancedness(old.masses, speeds)
    return new.where(is_new, old)


def _mixed(group: _Group, result: Placed, fresh: Placed, is_fresh: Bools, before: Ints) -> Placed:
    """Fresh plans for some banks, in the slots that their experts have now."""
    slots = aligned(before, fresh.slots)
    fresh = Placed(slots=slots, home=fresh.home, masses=_solved(group, slots))
    return fresh.where(is_fresh, result)


def _finished(group: _Group, found: Placed, options: PlanOptions) -> Placed:
    """With shares solved to the end, and a decode table."""
    exact = solve(found.slots, group.load, group.limits.speeds, _EXACT)
    result = _better(group, Placed(slots=found.slots, home=found.home, masses=exact), found)
    result.home = decode.assign(
        result.slots,
        group.load,
        group.limits.speeds,
        result.home,
        group.top_k,
        options.decode_tokens,
    )
    return result


def _peaks(group: _Group, home: Ints) -> dict[int, float]:
    speeds = group.limits.speeds
    return {
        rows: cost.slots_over_floor(group.load, home, speeds, group.top_k, rows)
        for rows in PREDICTED_ROWS
    }
