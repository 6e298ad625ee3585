"""Chooses the experts that share a device, by swaps of experts that have a single copy.

Split weights of spare copies can balance the load of the devices, so the arrangement may also serve
two other goals: that the busiest device of a decode step activates few slots, and that experts
which tokens often choose together are on one device, so that a token is sent to fewer devices.

Every round takes one device of each bank and makes its best swap with any other device.
"""

from __future__ import annotations

import numpy as np

from cluster.core.placement import FREE_SLOT
from cluster.planner.base import Bools, Floats, Ints, relative_speeds

LOAD_PRICE = 20.0
"""Weight of a device's squared relative deviation from the mean load, versus its decode cost."""
LOAD_PRICE_WITHOUT_SPARES = 2000.0
"""``LOAD_PRICE`` if no expert has a spare copy, so that split weights cannot balance the load."""
AFFINITY_PRICE = 60.0
"""Weight of the share of top-k pairs of experts on the same device, versus the decode cost."""


class Arrangement:
    """Primary copies of all banks, and the cost of each device, which swaps of experts reduce."""

    def __init__(
        self,
        slots: Ints,
        primary: Ints,
        loads: Floats,
        weight: Floats,
        speeds: Floats,
        affinity: Floats | None,
    ) -> None:
        """``weight`` [banks, experts] is the decode cost of each expert (``decode.weights``).

        ``affinity`` [banks, experts, experts] is how often two experts are chosen together,
        symmetric, with sum 1 in each bank; None to ignore it.
        """
        banks, devices, _ = slots.shape
        experts = loads.shape[1]
        bank, device, slot = np.nonzero(slots != FREE_SLOT)
        expert = slots[bank, device, slot]
        count = np.zeros((banks, experts))
        np.add.at(count, (bank, expert), 1.0)
        self.primary = primary.copy()
        self.is_single: Bools = count == 1
        self._rows = np.arange(banks)
        self._relative = relative_speeds(speeds)
        self._load = loads * (speeds > 0).sum()
        self._weight = weight
        self._affinity = affinity
        self._utilization = np.zeros((banks, devices))
        np.add.at(self._utilization, (bank, device), (self._load / count)[bank, expert])
        self._decode = np.zeros((banks, devices))
        np.add.at(self._decode, (self._rows[:, None], primary), weight)
        self._top = self._decode.mean(1, keepdims=True)
        has_spares = bool((count > 1).any())
        self._load_price = LOAD_PRICE if has_spares else LOAD_PRICE_WITHOUT_SPARES
        self._near = np.zeros((banks, experts, devices))
        if affinity is not None:
            for b in range(banks):
                here = np.zeros((experts, devices))
                here[expert[bank == b], device[bank == b]] = 1.0
                self._near[b] = affinity[b] @ here

    def _cost(self, utilization: Floats, decode: Floats, relative: Floats) -> Floats:
        spread = decode / relative - self._top[:, :, None]
        return np.asarray(np.exp(spread) + self._load_price * (utilization / relative - 1.0) ** 2)

    def improve(self, device: Ints) -> Bools:
        """Make the best swap of each bank's ``device`` [banks]; return whether it helps."""
        rows = self._rows
        mine = (self.primary == device[:, None]) & self.is_single
        width = max(int(mine.sum(1).max()), 1)
        own = np.argsort(~mine, axis=1, kind="stable")[:, :width]
        is_own = mine[rows[:, None], own]
        other = self.primary
        gain = self._gain(device, own, other)
        allowed = is_own[:, :, None] & (self.is_single & (other != device[:, None]))[:, None, :]
        gain = np.where(allowed, gain, -np.inf).reshape(len(rows), -1)
        best = gain.argmax(1)
        helps = gain[rows, best] > 1e-6
        first = own[rows, best // other.shape[1]]
        second = best % other.shape[1]
        self._swap(rows[helps], first[helps], second[helps])
        return np.asarray(helps)

    def _gain(self, device: Ints, own: Ints, other: Ints) -> Floats:
        """Return the gain of swapping the primary copies of two experts, [banks, own, experts].

        ``own`` are experts of ``device``; ``other`` [banks, experts] is the device of each expert.
        """
        rows = self._rows[:, None]
        here_utilization = self._utilization[rows, device[:, None]][:, :, None]
        here_decode = self._decode[rows, device[:, None]][:, :, None]
        there_utilization = self._utilization[rows, other][:, None, :]
        there_decode = self._decode[rows, other][:, None, :]
        moved = self._load[rows, own][:, :, None] - self._load[:, None, :]
        weight = self._weight[rows, own][:, :, None] - self._weight[:, None, :]
        here = self._relative[device][:, None, None]
        there = self._relative[other][:, None, :]
        gain = self._cost(here_utilization, here_decode, here)
        gain = gain + self._cost(there_utilization, there_decode, there)
        gain = gain - self._cost(here_utilization - moved, here_decode - weight, here)
        gain = gain - self._cost(there_utilization + moved, there_decode + weight, there)
        if self._affinity is not None:
            gain = gain + AFFINITY_PRICE * self._joined(device, own, other)
        return np.asarray(gain)

    def _joined(self, device: Ints, own: Ints, other: Ints) -> Floats:
        """Return by how much a swap raises the affinity within devices, [banks, own, experts].

        The swap exchanges the devices of an expert of ``own`` and any other expert.
        """
        assert self._affinity is not None
        rows = self._rows
        experts = np.arange(other.shape[1])
        stay = self._near[rows[:, None], own, device[:, None]][:, :, None]
        stay = stay + self._near[rows[:, None], experts[None], other][:, None, :]
        arrive = self._near[rows[:, None, None], own[:, :, None], other[:, None, :]]
        arrive = arrive + self._near[rows[:, None], experts[None], device[:, None]][:, None, :]
        pair = self._affinity[rows[:, None], own]
        return np.asarray(arrive - stay - 2.0 * pair)

    def _swap(self, rows: Ints, first: Ints, second: Ints) -> None:
        here, there = self.primary[rows, first], self.primary[rows, second]
        self.primary[rows, first], self.primary[rows, second] = there, here
        for values, sums in ((self._load, self._utilization), (self._weight, self._decode)):
            difference = values[rows, first] - values[rows, second]
            sums[rows, here] -= difference
            sums[rows, there] += difference
        if self._affinity is not None:
            change = self._affinity[rows, :, second] - self._affinity[rows, :, first]
            self._near[rows, :, here] += change
            self._near[rows, :, there] -= change

    def costliest(self, skipped: Bools) -> Ints:
        """Return the costliest device of each bank [banks], except ``skipped`` [banks, devices]."""
        cost = self._cost(
            self._utilization[:, :, None], self._decode[:, :, None], self._relative[None, :, None]
        )
        return np.asarray(np.where(skipped, -np.inf, cost[:, :, 0]).argmax(1))


def arrange(
    slots: Ints,
    primary: Ints,
    loads: Floats,
    weight: Floats,
    speeds: Floats,
    affinity: Floats | None = None,
    rounds: int = 40,
) -> tuple[Ints, Ints]:
    """Return slots and primary copies after swaps of experts that have a single copy.

    Every device keeps its numbers of experts and of primary copies. ``weight`` and ``affinity`` as
    in ``Arrangement``. In each of at most ``rounds`` rounds, a bank makes one swap; with
    ``affinity``, four swaps of each device come first.
    """
    state = Arrangement(slots, primary, loads, weight, speeds, affinity)
    tried = np.zeros(slots.shape[:2], dtype=bool)
    tried[:, speeds == 0] = True
    idle = tried.copy()
    sweeps = 0 if affinity is None else 4 * slots.shape[1]
    for step in range(rounds + sweeps):
        if step < sweeps:
            state.improve(np.full(len(slots), step % slots.shape[1]))
            continue
        device = state.costliest(tried)
        helped = state.improve(device)
        tried[~helped, device[~helped]] = True
        tried[helped] = idle[helped]
        if tried.all():
            break
    return _moved(slots, primary, state.primary, state.is_single), state.primary


def _moved(slots: Ints, before: Ints, after: Ints, is_single: Bools) -> Ints:
    """Return the slots after experts with a single copy went to their device in ``after``."""
    slots = slots.copy()
    for b in np.nonzero((before != after).any(1))[0]:
        gone = is_single[b] & (before[b] != after[b])
        for device in np.unique(before[b][gone]):
            left = np.nonzero(gone & (before[b] == device))[0]
            came = np.nonzero(gone & (after[b] == device))[0]
            row = slots[b, device]
            row[np.isin(row, left)] = came
    return slots
