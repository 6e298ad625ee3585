"""The default planner: computes a placement from expert load, devices and current placement.

Without a current placement the planner fills from scratch (``fill``), arranges primary copies
(``arrange``) and searches until every bank is balanced (``search``). With a current placement the
planner changes as few slots as possible: first the split weights alone (``split``), then single
moves within the budget. Finally it makes the decode tables from the existing copies (``decode``).

Differences from the public algorithm (``eplb``): the shares of copies are optimized instead of
equal, planning starts from the current placement, no device has two copies of an expert, devices
may differ, and decode steps have their own table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from cluster.core.checks import check
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.planner import cost, decode, split
from cluster.planner.arrange import arrange
from cluster.planner.assess import PlacedGroup, assess, placed_groups
from cluster.planner.base import (
    Bools,
    Floats,
    Ints,
    Plan,
    PlannedTopology,
    PlanOptions,
    build_placement,
    equally_large,
    normalised,
)
from cluster.planner.edits import Limits
from cluster.planner.fill import can_use_two_nodes, fill
from cluster.planner.groups import plan_groups
from cluster.planner.moves import aligned
from cluster.planner.peak import lower_peaks
from cluster.planner.search import (
    PlacedBanks,
    SearchGoal,
    num_on_one_node,
    search,
    solve,
    spread_over_nodes,
)

Coactivation = Mapping[tuple[str, int], Floats]
"""(bank, layer) -> how often a token chooses both of two experts, [num_experts, num_experts]."""

_FULL_TARGET = 0.998
"""Balancedness of a bank at which a placement from scratch needs no further search."""
_TARGET = 0.99
"""Balancedness from which on a planner with limited moves moves no expert of a bank."""
_LEAST_GAIN = 2e-4
"""Smallest gain in balancedness that justifies a move."""
_LEAST_GAIN_FULL = 5e-5
_WORTH_A_NEW_PLAN = 0.002
"""Gain in balancedness above which a bank is planned from scratch, if moves are not limited."""
_NO_LIMIT = 1 << 40
_EXACT = 1e-6
"""Tolerance of the solver for the final split weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Banks with equal numbers of experts, which are planned together."""

    loads: tuple[BankLoad, ...]
    load: Floats
    """Normalized loads of the experts, [num_banks, num_experts]; the sum of a bank is 1."""
    capacities: Ints
    """Number of slots per bank of each device, [num_devices]."""
    limits: Limits
    top_k: int


def plan(
    profile: LoadProfile,
    topology: PlannedTopology,
    current: ExpertPlacement | None = None,
    options: PlanOptions | None = None,
    coactivation: Coactivation | None = None,
) -> Plan:
    """Plan a balanced placement for a load; with ``current``, one within the move limit.

    ``options`` has the limit. Deterministic. No bank becomes less balanced than in ``current``,
    except to give experts a missing copy on a second node. Step groups with devices of their own
    are planned separately. Raises ``ConfigError`` if there are too few slots, or if ``current`` has
    other banks or devices.
    """
    options = options or PlanOptions()
    apart = plan_groups(
        topology,
        current,
        lambda _, own, part: plan(profile, own, part, options, coactivation).placement,
    )
    if apart is not None:
        return assess(profile, topology, apart, current)
    topology, old = topology.shared(), None
    if current is not None:
        old = list(placed_groups(profile, topology, current, "current placement"))
    budget = move_budget(current, options)
    found: dict[tuple[str, int], BankPlacement] = {}
    for index, group in enumerate(_groups(profile, topology)):
        if old is None:
            result = _from_scratch(group, options, coactivation)
        else:
            result = _from_current(group, old[index], options, budget)
            is_new = (result.slots != old[index].slots) & (result.slots != FREE_SLOT)
            budget -= int(is_new.sum())
        shares = split.shares(result.slots, result.slot_loads, group.load.shape[1])
        maps = build_placement(group.loads, result.slots, shares, result.primary, group.capacities)
        found |= {(bank.bank, bank.layer): bank for bank in maps}
    banks = tuple(found[b.bank, b.layer] for b in profile.banks)
    epoch = 1 if current is None else current.epoch + 1
    return assess(profile, topology, ExpertPlacement(epoch=epoch, banks=banks), current)


def resolved(
    profile: LoadProfile, topology: PlannedTopology, placement: ExpertPlacement
) -> ExpertPlacement:
    """Return ``placement`` with the best split weights and decode devices for a load.

    Slots and epoch stay.
    """
    options = PlanOptions(max_move_fraction=0.0)
    return placement.with_shares(plan(profile, topology, placement.packed(), options).placement)


def num_at_risk(profile: LoadProfile, topology: PlannedTopology, placement: ExpertPlacement) -> int:
    """Return the number of experts with copies in one failure domain, where slots allow two.

    0 if all devices are in one failure domain. Raises ``ConfigError`` if ``placement`` has other
    banks or devices.
    """
    if topology.has_one_domain:
        return 0
    placed = placed_groups(profile, topology, placement, "placement")
    return sum(
        int(num_on_one_node(found.slots, group.limits, group.load.shape[1]).sum())
        for group, found in zip(_groups(profile, topology), placed, strict=True)
    )


def move_budget(current: ExpertPlacement | None, options: PlanOptions) -> int:
    """Return the maximum number of slots that a plan may fill with other experts."""
    if current is None or options.max_move_fraction is None:
        return _NO_LIMIT
    slots = sum(len(s) for bank in current.banks for s in bank.physical_to_logical)
    return int(slots * options.max_move_fraction + 1e-9)


def _groups(profile: LoadProfile, topology: PlannedTopology) -> Iterator[_Group]:
    for banks in equally_large(profile):
        experts = len(banks[0].counts)
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


def _from_scratch(
    group: _Group, options: PlanOptions, coactivation: Coactivation | None
) -> PlacedBanks:
    limits = group.limits
    slots, primary = fill(
        group.load, group.capacities, limits.speeds, limits.nodes, limits.two_nodes
    )
    weight = decode.weights(group.load, group.top_k, options.decode_tokens)
    affinity = _affinity(group, coactivation)
    slots, primary = arrange(slots, primary, group.load, weight, limits.speeds, affinity)
    start = _solved(group, slots, primary)
    goal = SearchGoal(
        target=_FULL_TARGET, least_gain=_LEAST_GAIN_FULL, budget=_NO_LIMIT, per_move=False
    )
    found = _finished(group, search(start, group.load, limits, goal), options)
    if affinity is not None:  # swaps would separate them again
        return found
    return lower_peaks(found, group.load, limits, group.top_k, options.decode_tokens)


def _affinity(group: _Group, coactivation: Coactivation | None) -> Floats | None:
    """Convert coactivation to symmetric arrays [banks, experts, experts], with sum 1 in a bank.

    None if the coactivation is unknown.
    """
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
    group: _Group, before: PlacedGroup, options: PlanOptions, budget: int
) -> PlacedBanks:
    limits, slots, primary = group.limits, before.slots, before.primary
    old = PlacedBanks(slots=slots, primary=primary, slot_loads=before.slot_loads)
    start = _better(group, _solved(group, slots, primary), old)
    start, used = spread_over_nodes(start, group.load, limits, budget)
    is_free = options.max_move_fraction is None
    goal = SearchGoal(
        target=_FULL_TARGET if is_free else _TARGET,
        least_gain=_LEAST_GAIN,
        budget=budget - used,
        per_move=True,
    )
    result = search(start, group.load, limits, goal)
    if is_free:
        fresh = _from_scratch(group, options, None)
        gain = cost.balancedness(fresh.slot_loads, limits.speeds)
        gain = gain - cost.balancedness(result.slot_loads, limits.speeds)
        lacks = num_on_one_node(result.slots, limits, group.load.shape[1]) > 0
        result = _mixed(group, result, fresh, (gain > _WORTH_A_NEW_PLAN) | lacks, slots)
    return _finished(group, result, options)


def _solved(group: _Group, slots: Ints, primary: Ints, tolerance: float = 1e-4) -> PlacedBanks:
    slot_loads = solve(slots, group.load, group.limits.speeds, tolerance)
    return PlacedBanks(slots=slots, primary=primary, slot_loads=slot_loads)


def _better(group: _Group, new: PlacedBanks, old: PlacedBanks) -> PlacedBanks:
    """Return each bank as in ``new``, unless the bank is better balanced in ``old``."""
    speeds = group.limits.speeds
    is_new = cost.balancedness(new.slot_loads, speeds) >= cost.balancedness(old.slot_loads, speeds)
    return new.where(is_new, old)


def _mixed(
    group: _Group, result: PlacedBanks, fresh: PlacedBanks, is_fresh: Bools, before: Ints
) -> PlacedBanks:
    """Return the banks of ``fresh`` where ``is_fresh`` [num_banks], else of ``result``.

    Experts of fresh banks that stay on their device keep their slot of ``before``.
    """
    fresh = _solved(group, aligned(before, fresh.slots), fresh.primary)
    return fresh.where(is_fresh, result)


def _finished(group: _Group, found: PlacedBanks, options: PlanOptions) -> PlacedBanks:
    """Return ``found`` with exactly solved split weights and a new decode table."""
    result = _better(group, _solved(group, found.slots, found.primary, _EXACT), found)
    result.primary = decode.assign(
        result.slots,
        group.load,
        group.limits.speeds,
        result.primary,
        group.top_k,
        options.decode_tokens,
    )
    return result
