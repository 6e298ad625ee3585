"""Computes split weights: the share of an expert's tokens that each of its copies takes.

For given copies, the device loads that are best for every convex measure at once, including the
maximum, minimize ``sum_d load_d^2 / speed_d``. This is a convex quadratic program with one equality
per expert; a primal-dual interior point method solves it for all banks together. Each iteration
solves one linear system of the size of the devices, and 4 to 8 iterations suffice. If several
splits are equally good, the result is an interior one, in which every copy can change in both
directions.

Example: experts 0, 1, 2 with loads 0.5, 0.3, 0.2 on two equal devices that hold (0, 1) and (0, 2):
the slot loads are 0.2 + 0.3 and 0.3 + 0.2, so expert 0 is split 0.4 : 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.core.placement import FREE_SLOT
from cluster.planner.base import Bools, Floats, Ints

_MAX_ITERATIONS = 40
_CENTERING = 0.1
"""Factor by which each iteration of the interior point method lowers the complementarity."""
_STEP = 0.95
"""Maximum step of the interior point method, as a share of the distance to the boundary."""
_TINY = 1e-7
"""Smallest load of an expert relative to the mean; the solver needs positive loads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Copies:
    """The copies of all experts with more than one copy, over all banks, sorted by expert."""

    bank: Ints
    """Bank of each copy, [num_copies]."""
    expert: Ints
    """Expert of each copy, as bank * num_experts + expert, [num_copies]."""
    device: Ints
    """Device of each copy, as bank * num_devices + device, [num_copies]."""
    load: Floats
    """Load of each copy's expert, over all its copies, [num_copies]."""
    position: Ints
    """Index of each copy in the flattened array of slots, [num_copies]."""
    pairs: tuple[Ints, Ints]
    """Index pairs of copies of the same expert."""
    base: Floats
    """Load of each device from experts with a single copy, [num_banks * num_devices]."""
    target: Floats
    """Speed of each device, which is its load at perfect balance, [num_banks * num_devices]."""
    shape: tuple[int, int, int]
    """Numbers of banks, devices per bank and experts per bank."""

    def over_experts(self, values: Floats) -> Floats:
        """Sum ``values`` [num_copies] over the copies of each expert; return it for each copy."""
        banks, _, experts = self.shape
        return np.asarray(np.bincount(self.expert, values, banks * experts)[self.expert])

    def over_devices(self, values: Floats) -> Floats:
        """Sum ``values`` [num_copies] over the copies on each device, [num_banks * num_devices]."""
        banks, devices, _ = self.shape
        return np.bincount(self.device, values, banks * devices).astype(np.float64, copy=False)

    def over_banks(self, values: Floats) -> Floats:
        """Sum ``values`` [num_copies] over the copies of each bank, [num_banks]."""
        return np.bincount(self.bank, values, self.shape[0]).astype(np.float64, copy=False)


def solve(slots: Ints, loads: Floats, speeds: Floats, tolerance: float = 1e-6) -> Floats:
    """Return the slot loads with the best balance of the devices, for given copies of experts.

    Slots and slot loads have the shape [num_banks, num_devices, num_slots]. ``loads`` [num_banks,
    num_experts] sum to 1 in each bank, ``speeds`` [num_devices] to 1. The loads of an expert's
    copies sum to the expert's load (an expert without load counts as a tiny load). ``tolerance``
    bounds the gap to the optimum of the quadratic program.
    """
    loads = np.maximum(loads, _TINY / loads.shape[1])
    loads = loads / loads.sum(1, keepdims=True)
    slot_loads, copies = _index(slots, loads, speeds)
    if len(copies.bank):
        slot_loads[copies.position] = _interior_point(copies, tolerance)
    return slot_loads.reshape(slots.shape)


def shares(slots: Ints, slot_loads: Floats, num_experts: int) -> Floats:
    """Return split weights: each slot's load divided by the load of its expert; 0 in free slots.

    Copies of an expert without load get equal weights.
    """
    banks = len(slots)
    expert = np.where(slots == FREE_SLOT, num_experts, slots)
    flat = (expert + (num_experts + 1) * np.arange(banks)[:, None, None]).reshape(-1)
    totals = np.bincount(flat, slot_loads.reshape(-1), banks * (num_experts + 1))[flat]
    equal = 1.0 / np.bincount(flat, minlength=banks * (num_experts + 1))[flat]
    own = np.where(totals > 0, slot_loads.reshape(-1) / np.maximum(totals, 1e-300), equal)
    return np.where(slots == FREE_SLOT, 0.0, own.reshape(slots.shape))


def _index(slots: Ints, loads: Floats, speeds: Floats) -> tuple[Floats, _Copies]:
    """Return flattened slot loads, and the copies whose loads are to be solved.

    The slot loads of experts with a single copy are filled in; the others are 0.
    """
    banks, devices, width = slots.shape
    experts = loads.shape[1]
    position = np.nonzero(slots.reshape(-1) != FREE_SLOT)[0]
    bank = position // (devices * width)
    expert = bank * experts + slots.reshape(-1)[position]
    device = position // width
    count = np.bincount(expert, minlength=banks * experts)
    is_single = count[expert] == 1
    slot_loads = np.zeros(slots.size)
    single = position[is_single]
    slot_loads[single] = loads.reshape(-1)[expert[is_single]]
    base = np.bincount(device[is_single], slot_loads[single], banks * devices).astype(
        np.float64, copy=False
    )
    several = np.nonzero(~is_single)[0]
    several = several[np.argsort(expert[several], kind="stable")]
    return slot_loads, _Copies(
        bank=bank[several],
        expert=expert[several],
        device=device[several],
        load=loads.reshape(-1)[expert[several]],
        position=position[several],
        pairs=_pairs(expert[several]),
        base=base,
        target=np.tile(np.maximum(speeds, 1e-9), banks),
        shape=(banks, devices, experts),
    )


def _pairs(expert: Ints) -> tuple[Ints, Ints]:
    """Return the index pairs of equal values in a sorted array, as two arrays."""
    firsts, seconds = [], []
    for offset in range(1, len(expert)):
        same = np.nonzero(expert[offset:] == expert[:-offset])[0]
        if not len(same):
            break
        firsts.append(same)
        seconds.append(same + offset)
    none = np.zeros(0, dtype=np.int64)
    return np.concatenate([none, *firsts]), np.concatenate([none, *seconds])


def _interior_point(copies: _Copies, tolerance: float) -> Floats:
    """Solve the quadratic program: return the slot loads of the copies, [num_copies].

    All slot loads are positive, and the sums over the copies of an expert are exact.
    """
    banks, _, experts = copies.shape
    slot_load = copies.load / copies.over_experts(np.ones(len(copies.load)))
    utilization = (copies.base + copies.over_devices(slot_load)) / copies.target
    lowest = np.full(banks * experts, np.inf)
    np.minimum.at(lowest, copies.expert, utilization[copies.device])
    slack = utilization[copies.device] - lowest[copies.expert] + 0.1
    num_copies = np.maximum(np.bincount(copies.bank, minlength=banks), 1)
    for _ in range(_MAX_ITERATIONS):
        gap = copies.over_banks(slot_load * slack)
        if gap.max() < tolerance:
            break
        centre = (_CENTERING * gap / num_copies)[copies.bank]
        is_open = gap >= tolerance
        change = _newton(copies, slot_load, slack, centre, is_open)
        slack_change = (centre - slack * change) / slot_load - slack
        moves = is_open[copies.bank]
        slot_load = slot_load + moves * _step(copies, slot_load, change) * change
        slack = slack + moves * _step(copies, slack, slack_change) * slack_change
    return slot_load * (copies.load / copies.over_experts(slot_load))


def _newton(
    copies: _Copies, slot_load: Floats, slack: Floats, centre: Floats, is_open: Bools
) -> Floats:
    """Return the Newton direction of the slot loads of open banks, [num_copies].

    The direction preserves the sum of the slot loads of every expert. With D = slot load / slack,
    r = centre / slot load - utilization, v the change of the devices' utilization, T = target, and
    q = r minus its D-weighted mean over the expert: change = D (q - v + that mean of v), and
    ``(T + Laplacian(D)) v`` = the sum of D q over each device.
    """
    banks, devices, _ = copies.shape
    utilization = (copies.base + copies.over_devices(slot_load)) / copies.target
    weight = slot_load / slack
    total = copies.over_experts(weight)
    push = centre / slot_load - utilization[copies.device]
    push = push - copies.over_experts(weight * push) / total
    first, second = copies.pairs
    coupling = -weight[first] * weight[second] / total[first]
    column = copies.device % devices
    row = copies.device * devices
    index = np.concatenate([row[first] + column[second], row[second] + column[first]])
    flat = np.bincount(index, np.concatenate([coupling, coupling]), banks * devices * devices)
    diagonal = copies.target + copies.over_devices(weight * (1.0 - weight / total))
    matrix = flat.astype(np.float64, copy=False).reshape(banks, devices, devices)
    matrix[:, np.arange(devices), np.arange(devices)] += diagonal.reshape(banks, devices)
    right = copies.over_devices(weight * push).reshape(banks, devices, 1)
    utilization = np.zeros((banks, devices, 1))
    utilization[is_open] = np.linalg.solve(matrix[is_open], right[is_open])
    change = utilization.reshape(-1)[copies.device]
    return np.asarray(
        weight * (push - change + copies.over_experts(weight * change) / total), dtype=np.float64
    )


def _step(copies: _Copies, values: Floats, change: Floats) -> Floats:
    """Return step lengths, at most 1, that keep all values of a copy's bank positive.

    The shape is [num_copies], with one length per bank; ``change`` is the direction of the step.
    """
    falling = change < 0
    ratio = np.where(falling, -values / np.where(falling, change, -1.0), np.inf)
    longest = np.full(copies.shape[0], np.inf)
    np.minimum.at(longest, copies.bank, ratio)
    return np.asarray(np.minimum(1.0, _STEP * longest)[copies.bank])
