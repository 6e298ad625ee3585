"""Local search that improves a placement with few moves.

Every round tries some sets of edits for each bank that is not balanced well enough, solves the
split weights of all sets at once, and takes the set with the largest gain per move for each bank.
The banks share one move budget, which is spent where the gain is largest.

A single hot expert hides the gain of other moves in the maximum, so half of the measure of a gain
is a power mean of the utilization, which depends on all heavy devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.core.placement import FREE_SLOT
from cluster.planner import split
from cluster.planner.base import Bools, Floats, Ints
from cluster.planner.cost import balancedness, utilization
from cluster.planner.edits import BankView, Edit, Limits, edit_sets, revert_edits

_POWER = 8
_MAX_ROUNDS = 60
_SCARCE = 1.0
"""Number of moves left per unfinished bank below which earlier moves are reconsidered."""
_BRIEF, _FULL, _STUCK = 0, 1, 2
"""Effort of the search for a bank, raised if no set of edits helps: few sets, all sets, no set."""
_FAR_OFF = 0.95
"""Balancedness of a bank below which all sets of edits are tried immediately."""
_MAX_BATCH = 1 << 22
"""Maximum number of values in linear systems that are solved together."""


@dataclass(kw_only=True, slots=True)
class PlacedBanks:
    """Placed banks with their slot loads and decode devices, as arrays."""

    slots: Ints
    """Expert in each slot, [num_banks, num_devices, num_slots]; ``FREE_SLOT`` for none."""
    primary: Ints
    """Device whose copy of the expert serves decode steps, [num_banks, num_experts]."""
    slot_loads: Floats
    """Load of each slot, as a share of its bank's load, [num_banks, num_devices, num_slots]."""

    def copy(self) -> PlacedBanks:
        return PlacedBanks(
            slots=self.slots.copy(), primary=self.primary.copy(), slot_loads=self.slot_loads.copy()
        )

    def where(self, chosen: Bools, other: PlacedBanks) -> PlacedBanks:
        """Return these banks where ``chosen`` [num_banks] is true, and else those of ``other``."""
        return PlacedBanks(
            slots=np.where(chosen[:, None, None], self.slots, other.slots),
            primary=np.where(chosen[:, None], self.primary, other.primary),
            slot_loads=np.where(chosen[:, None, None], self.slot_loads, other.slot_loads),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchGoal:
    """Goal and limits of the local search."""

    target: float
    """Balancedness of a bank at which the search leaves the bank unchanged."""
    least_gain: float
    """Smallest gain of a move, where the gain is in the mean of balancedness and ``_measure``."""
    budget: int
    """Maximum number of moves in all banks together."""
    per_move: bool
    """Whether to choose the edits with the best gain per move instead of the best gain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    bank: int
    slots: Ints
    primary: Ints
    moves: int
    """Number of additional moves; negative if slots get the expert back that they had first."""


def solve(slots: Ints, loads: Floats, speeds: Floats, tolerance: float = 1e-4) -> Floats:
    """Run ``split.solve``, which returns slot loads, on a few banks at a time to bound memory."""
    step = max(1, _MAX_BATCH // slots.shape[1] ** 2)
    pieces = [
        split.solve(slots[i : i + step], loads[i : i + step], speeds, tolerance)
        for i in range(0, len(slots), step)
    ]
    return np.concatenate(pieces)


def search(placed: PlacedBanks, loads: Floats, limits: Limits, goal: SearchGoal) -> PlacedBanks:
    """Return an improved placement at most ``goal.budget`` moves from ``placed``.

    ``loads`` [num_banks, num_experts] sum to 1 in each bank. No bank becomes less balanced.
    """
    now = placed.copy()
    balance = balancedness(now.slot_loads, limits.speeds)
    measure = _measure(now.slot_loads, limits.speeds)
    effort = np.where(balance < _FAR_OFF, _FULL, _BRIEF)
    for _ in range(_MAX_ROUNDS):
        left = goal.budget - _num_moves(placed.slots, now.slots)
        active = np.nonzero((balance < goal.target) & (effort < _STUCK))[0]
        if not len(active):
            break
        found = _candidates(placed.slots, now, active, effort, limits, goal, left)
        effort[active] += 1
        if not found:
            continue
        owner = np.array([c.bank for c in found])
        slot_loads = solve(np.array([c.slots for c in found]), loads[owner], limits.speeds)
        after = np.minimum(balancedness(slot_loads, limits.speeds), goal.target + 0.002)
        gains = 0.5 * (after - balance[owner])
        gains += 0.5 * (_measure(slot_loads, limits.speeds) - measure[owner])
        for i in _chosen(found, gains, goal):
            candidate = found[i]
            if candidate.moves > left:
                continue
            b = candidate.bank
            left -= candidate.moves
            now.slots[b], now.primary[b], now.slot_loads[b] = (
                candidate.slots,
                candidate.primary,
                slot_loads[i],
            )
            effort[b] = _BRIEF if balance[b] > _FAR_OFF else _FULL
        balance = balancedness(now.slot_loads, limits.speeds)
        measure = _measure(now.slot_loads, limits.speeds)
    return now.where(balance >= balancedness(placed.slot_loads, limits.speeds), placed)


def _num_moves(before: Ints, after: Ints) -> int:
    return int((before != after).sum())


def _measure(slot_loads: Floats, speeds: Floats) -> Floats:
    """Return the reciprocal of the power mean of the devices' utilization, [num_banks].

    The mean is weighted by speed; 1 is perfect balance.
    """
    mean = (speeds * utilization(slot_loads, speeds) ** _POWER).sum(1)
    return np.asarray(mean ** (-1.0 / _POWER))


def _candidates(
    start: Ints,
    now: PlacedBanks,
    active: Ints,
    effort: Ints,
    limits: Limits,
    goal: SearchGoal,
    left: int,
) -> list[_Candidate]:
    """Return placements after possible edits of the ``active`` banks, within ``left`` moves.

    If few moves are left, the candidates include edits that revert moves from ``start``.
    """
    found = []
    for b in active.tolist():
        view = BankView(now.slots[b], now.primary[b], now.slot_loads[b], limits)
        tolerance = 0.125 * max(1 - goal.target, 1 - 1 / float(view.peak))
        made = _num_moves(start[b], now.slots[b])
        tried = edit_sets(view, tolerance, is_brief=effort[b] == _BRIEF)
        if effort[b] == _FULL and left < _SCARCE * len(active):
            tried += revert_edits(view, start[b], tolerance)
        for edits in tried:
            slots, primary = edited(now.slots[b], now.primary[b], edits)
            moves = _num_moves(start[b], slots) - made
            if moves <= left:
                found.append(_Candidate(bank=b, slots=slots, primary=primary, moves=moves))
    return found


def _chosen(found: list[_Candidate], gains: Floats, goal: SearchGoal) -> list[int]:
    """Return the indices of the best candidate of each bank, most valuable first.

    Candidates with a too small gain are left out.
    """
    best: dict[int, tuple[float, int]] = {}
    for i, candidate in enumerate(found):
        moves = candidate.moves
        if gains[i] < max(goal.least_gain * moves, -goal.least_gain) + 1e-9:
            continue
        value = float(gains[i]) / (max(moves, 1) if goal.per_move else 1)
        if candidate.bank not in best or value > best[candidate.bank][0]:
            best[candidate.bank] = (value, i)
    return [i for _, i in sorted(best.values(), key=lambda pair: (-pair[0], pair[1]))]


def edited(slots: Ints, primary: Ints, edits: list[Edit]) -> tuple[Ints, Ints]:
    """Return one bank's slots and primary copies after edits; moved primary copies stay primary."""
    slots, primary = slots.copy(), primary.copy()
    gone = [(device, int(slots[device, slot])) for device, slot, _ in edits]
    for device, slot, expert in edits:
        slots[device, slot] = expert
    came = {expert: device for device, _, expert in edits}
    for device, expert in gone:
        if expert != FREE_SLOT and primary[expert] == device:
            primary[expert] = came[expert]
    return slots, primary


def spread_over_nodes(
    placed: PlacedBanks, loads: Floats, limits: Limits, budget: int
) -> tuple[PlacedBanks, int]:
    """Add second copies on other nodes for experts that have copies on one node only.

    Returns the placed banks and the number of moves, at most ``budget``. Does nothing unless
    ``limits.two_nodes``.
    """
    now = placed.copy()
    used = 0
    for b in range(len(loads) if limits.two_nodes else 0):
        missing = _on_one_node(now.slots[b], limits, loads.shape[1])
        for expert in sorted(missing, key=lambda e: (-loads[b, e], e)):
            edit = _second_copy(now, b, expert, limits) if used < budget else None
            if edit is not None:
                now.slots[b], now.primary[b] = edited(now.slots[b], now.primary[b], [edit])
                now.slot_loads[b] = solve(now.slots[b : b + 1], loads[b : b + 1], limits.speeds)[0]
                used += 1
    return now, used


def num_on_one_node(slots: Ints, limits: Limits, num_experts: int) -> Ints:
    """Return the number of experts in each bank on one node that must be on two, [num_banks]."""
    return np.array(
        [limits.two_nodes * len(_on_one_node(bank, limits, num_experts)) for bank in slots]
    )


def _on_one_node(slots: Ints, limits: Limits, num_experts: int) -> list[int]:
    seen: list[set[int]] = [set() for _ in range(num_experts)]
    for device, held in enumerate(slots.tolist()):
        for expert in held:
            if expert != FREE_SLOT:
                seen[expert].add(int(limits.nodes[device]))
    return [e for e, nodes in enumerate(seen) if len(nodes) < 2]


def _second_copy(now: PlacedBanks, bank: int, expert: int, limits: Limits) -> Edit | None:
    view = BankView(now.slots[bank], now.primary[bank], now.slot_loads[bank], limits)
    taken = set(limits.nodes[view.held[expert]].tolist())
    places = [
        (float(view.slot_loads[d, s]), d, s)
        for d in range(len(view.slots))
        if int(limits.nodes[d]) not in taken
        for s in range(view.slots.shape[1])
        if view.spare(d, s)
    ]
    if not places:
        return None
    _, device, slot = min(places)
    return device, slot, expert
