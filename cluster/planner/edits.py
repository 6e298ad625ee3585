"""Proposes edits of one bank for the local search, each of which changes few slots.

There are two kinds of edits. A *copy* gives a busy expert one more copy on a light device, in a
free slot or in place of a dispensable copy. A *swap* exchanges experts of two devices, in two
moves. Copies are proposed as one list in the order of the light devices. Each entry builds on the
earlier ones, so every prefix of the list is a useful set of edits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.core.placement import FREE_SLOT
from cluster.planner.base import Bools, Floats, Ints

Edit = tuple[int, int, int]
"""(device, slot, expert): an edit that puts the expert into the slot of the device."""

_MAX_COPIES = 16
_BEGINNINGS = (1, 2, 3, 4, 6, 8, 16)
_NUM_SINGLES = 4
_NUM_SWAPS = 4
_NUM_INSTEAD = 2
_SWAP_FROM, _SWAP_TO = 4, 6
"""Maximum numbers of heavy devices and of light devices that are considered for swaps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Rules that every placement of the local search must satisfy."""

    usable: Bools
    """Whether each slot exists, [num_devices, num_slots]."""
    speeds: Floats
    """Relative speeds of the devices, [num_devices], with sum 1; 0 for devices without slots."""
    nodes: Ints
    """Index of each device's failure domain, usually a node, [num_devices]."""
    two_nodes: bool
    """Whether every expert must keep copies on two nodes (failure domains)."""


class BankView:
    """One placed bank, with derived values (loads, utilization) from which edits are chosen."""

    def __init__(self, slots: Ints, primary: Ints, slot_loads: Floats, limits: Limits) -> None:
        num_experts = len(primary)
        self.slots = slots
        self.primary = primary
        self.slot_loads = slot_loads
        self.limits = limits
        self.load = slot_loads.sum(1)
        self.is_there = limits.speeds > 0
        self.utilization = np.where(self.is_there, self.load / np.maximum(limits.speeds, 1e-9), 1.0)
        devices = np.arange(len(slots))[:, None]
        held = np.zeros((num_experts + 1, len(slots)), dtype=bool)
        held[slots, devices] = True
        slot_load = np.zeros((num_experts + 1, len(slots)))
        slot_load[slots, devices] = slot_loads
        self.held: Bools = held[:num_experts]
        self.slot_load: Floats = slot_load[:num_experts]
        self.count = self.held.sum(1)
        self.expert_utilization = np.where(self.held, self.utilization[None], np.inf).min(1)

    @property
    def peak(self) -> float:
        """Highest utilization (load over speed) of a device."""
        return float(self.utilization[self.is_there].max())

    def peaks(self) -> Bools:
        """Return whether each device has the highest utilization, [num_devices]."""
        return np.asarray(self.is_there & (self.utilization >= self.peak - 1e-3))

    def spare(self, device: int, slot: int) -> bool:
        """Return whether a slot may get another expert.

        A slot may if it is free, or if its copy is not primary and ``keeps_nodes`` permits it.
        """
        expert = int(self.slots[device, slot])
        if expert == FREE_SLOT:
            return bool(self.limits.usable[device, slot])
        return int(self.primary[expert]) != device and self.keeps_nodes(expert, device)

    def keeps_nodes(self, expert: int, gone: int) -> bool:
        """Return whether ``expert`` stays on two nodes, if required, without its copy on a device.

        ``gone`` is that device. An expert that is only on one node anyway is no obstacle.
        """
        if not self.limits.two_nodes:
            return True
        here = self.held[expert].copy()
        before = len(set(self.limits.nodes[here].tolist()))
        here[gone] = False
        return before < 2 or len(set(self.limits.nodes[here].tolist())) >= 2


def edit_sets(view: BankView, tolerance: float, is_brief: bool) -> list[list[Edit]]:
    """Return candidate sets of edits of a bank, for the local search to try.

    Light devices have a utilization below ``1 - tolerance``, except perhaps those of the first two
    copies. ``is_brief``: only the few sets that are most often the best.
    """
    copies = _copies(view, tolerance)
    if is_brief:
        found = [copies[:n] for n in (1, 2) if n <= len(copies)]
        return found + _swaps(view)[:1]
    found = [copies[:n] for n in _BEGINNINGS if n <= len(copies)]
    found += [[edit] for edit in copies[1:_NUM_SINGLES]]
    if len(copies) > 2:
        found.append(copies[1:3])
    return found + _swaps(view)


def revert_edits(view: BankView, start: Ints, tolerance: float) -> list[list[Edit]]:
    """Return sets of edits that restore a slot of ``start``, alone or with a copy elsewhere.

    Such a set needs no additional moves.
    """
    back = []
    for device, slot in np.argwhere(view.slots != start).tolist():
        old = int(start[device, slot])
        if old != FREE_SLOT and not view.held[old, device] and view.spare(device, slot):
            back.append((device, slot, old))
    other = _copies(view, tolerance)[:_NUM_INSTEAD]
    pairs = [[one, new] for one in back for new in other if _are_apart(view, one, new)]
    return [[one] for one in back] + pairs


def _are_apart(view: BankView, one: Edit, other: Edit) -> bool:
    """Return whether two edits are on different devices and remove copies of different experts."""
    gone = [int(view.slots[d, s]) for d, s, _ in (one, other)]
    return one[0] != other[0] and (gone[0] != gone[1] or gone[0] == FREE_SLOT)


def _copies(view: BankView, tolerance: float) -> list[Edit]:
    """Return edits that copy experts of heavy devices to light devices, lightest device first."""
    speeds, peaks = view.limits.speeds, view.peaks()
    heavy = view.utilization > 1 + tolerance
    left = view.slot_load[:, heavy].sum(1)
    at_peak = view.slot_load[:, peaks].sum(1)
    excess = float(((view.utilization - 1) * speeds)[heavy].sum())
    found: list[Edit] = []
    taken: set[int] = set()
    for device in np.argsort(view.utilization, kind="stable").tolist():
        is_light = view.utilization[device] < 1 - tolerance or len(found) < 2
        if view.utilization[device] >= 1 + tolerance or not is_light or excess <= 0:
            break
        slot = _least_slot(view, device, taken)
        if slot is None:
            continue
        old = int(view.slots[device, slot])
        lack = max((1 - view.utilization[device]) * speeds[device], 0.0)
        lack += 0.7 * float(view.slot_loads[device, slot])
        gap = np.maximum(view.expert_utilization - view.utilization[device], 0.0)
        score = np.minimum(left + 0.1 * at_peak, 1.3 * lack) * gap * ~view.held[:, device]
        if not found:
            score = score * (at_peak > 0)
        if old != FREE_SLOT:
            score[old] = 0.0
        expert = int(score.argmax())
        if score[expert] <= 0:
            continue
        found.append((device, slot, expert))
        taken.add(old)
        used = min(float(left[expert]), lack)
        left[expert] -= used
        excess -= used
        if len(found) == _MAX_COPIES:
            break
    return found


def _least_slot(view: BankView, device: int, taken: set[int]) -> int | None:
    """Return a free slot of a device, or the dispensable slot with the smallest load, or None.

    ``taken`` are experts that lose a copy to other edits; an expert loses at most one copy in a set
    of edits.
    """
    slots = [
        s
        for s in range(view.slots.shape[1])
        if (int(view.slots[device, s]) == FREE_SLOT or int(view.slots[device, s]) not in taken)
        and view.spare(device, s)
    ]
    return min(slots, key=lambda s: float(view.slot_loads[device, s]), default=None)


def _swaps(view: BankView) -> list[list[Edit]]:
    """Return swaps of an expert of a heavy device for a smaller expert of a light device.

    First come swaps that can move the heavy device's excess load to the light device: at least the
    load of the heavy device's copy, at most the load of the expert on all heavy devices. Primary
    copies are swapped for primary copies, so that every device keeps its number of primary copies.
    """
    speeds, utilization = view.limits.speeds, view.utilization
    here = np.nonzero(view.peaks())[0][:_SWAP_FROM]
    there = np.argsort(utilization, kind="stable")[:_SWAP_TO]
    excess = ((utilization[here] - 1) * speeds[here])[:, None]
    lack = np.maximum((1 - utilization[there]) * speeds[there], 1e-3 * speeds[there])
    wanted = np.minimum(excess, lack)
    own, other = view.slots[here], view.slots[there]
    known_own, known_other = np.maximum(own, 0), np.maximum(other, 0)
    fits_there = (own != FREE_SLOT)[:, :, None] & ~view.held[known_own][:, :, there]
    fits_here = (other != FREE_SLOT)[:, :, None] & ~view.held[known_other][:, :, here]
    allowed = fits_there[:, :, :, None] & fits_here.transpose(2, 0, 1)[:, None]
    is_primary = view.primary[known_own] == here[:, None]
    allowed &= (
        is_primary[:, :, None, None] == (view.primary[known_other] == there[:, None])[None, None]
    )
    allowed &= (utilization[here][:, None] > utilization[there])[:, None, :, None]
    back = view.slot_loads[there][None, None]
    most = (view.slot_load[:, view.utilization > 1].sum(1)[known_own])[:, :, None, None] - back
    least = np.minimum(view.slot_loads[here][:, :, None, None] - back, most)
    wanted = wanted[:, None, :, None]
    misfit = np.maximum(np.maximum(least - wanted, wanted - most), 0.0) - 0.01 * (most - least)
    misfit = np.where(allowed & (most > 0), misfit, np.inf)
    return _best_swaps(view, here, there, misfit)


def _best_swaps(view: BankView, here: Ints, there: Ints, misfit: Floats) -> list[list[Edit]]:
    """Return the swaps with the smallest ``misfit``, at most one for each slot of a heavy device.

    ``misfit`` [heavy devices, slots, light devices, slots] is infinite for forbidden swaps;
    ``here`` and ``there`` are the heavy and the light devices.
    """
    devices, width = misfit.shape[0], misfit.shape[1]
    flat = misfit.reshape(devices * width, -1)
    best = flat.argmin(1)
    found: list[list[Edit]] = []
    for row in np.argsort(flat.min(1), kind="stable").tolist():
        if len(found) == _NUM_SWAPS or not np.isfinite(flat[row, best[row]]):
            break
        one, slot = int(here[row // width]), row % width
        two, place = int(there[best[row] // width]), int(best[row] % width)
        expert, back = int(view.slots[one, slot]), int(view.slots[two, place])
        if _swap_keeps_nodes(view, expert, one, two) and _swap_keeps_nodes(view, back, two, one):
            found.append([(one, slot, back), (two, place, expert)])
    return found


def _swap_keeps_nodes(view: BankView, expert: int, here: int, there: int) -> bool:
    nodes = view.limits.nodes
    return bool(nodes[here] == nodes[there]) or view.keeps_nodes(expert, here)
