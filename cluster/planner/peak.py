"""Finds swaps that reduce the expected peak: the busiest device's activated slots in decode steps.

The module ``decode`` balances a bound of the expected peak. This is fast, but the exact value is
lower if uncertainty is concentrated: some devices have few experts that are nearly always
activated, other devices have more experts that rarely are. With F_d(t) the probability that device
d serves at most t slots in a step,

    expected peak = sum over t of 1 - prod_d F_d(t)

and a swap changes two of the factors by one Bernoulli variable each. Every round takes the device
of each bank that raises the peak most, and makes its best swap: one of its slots for a slot of
another device, or a primary copy for a redundant one. A swap must keep the load balanced and must
not make larger batches much worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.core.placement import FREE_SLOT
from cluster.planner.base import Bools, Floats, Ints, relative_speeds
from cluster.planner.cost import activation, balancedness, expected_peak, sum_distribution
from cluster.planner.edits import Limits
from cluster.planner.search import PlacedBanks, solve

_LEAST_GAIN = 1e-4
"""Smallest gain for which a swap is made, in slots of the expected peak."""
_BALANCED = 0.998
"""Balancedness of a bank that a swap must preserve if the bank had reached it."""
_SLACK = 0.01
"""Share by which the expected peak of larger batches may grow."""
_LARGER = (4, 16)
"""Larger batches that swaps must not make much worse, in multiples of the optimized batch."""
_TRIES = 6
"""Maximum number of swaps of a device that are evaluated exactly."""
_FAILURES = 8
"""Number of consecutive devices of a bank without a good swap after which the bank is finished."""
_ROUNDS = 150
_MOST_WORK = 20_000_000
"""Maximum number of intermediate values of a search; they take some tenths of a second."""
_SOLVING = 32
"""Cost of solving a bank's split weights, per pair of devices, in the unit of ``_MOST_WORK``."""
_THRESHOLDS = 64
"""Number of points at which distributions are evaluated if devices differ in speed."""
_TINY = 1e-12


def lower_peaks(
    start: PlacedBanks, loads: Floats, limits: Limits, top_k: int, rows: int
) -> PlacedBanks:
    """Return ``start`` after swaps that lower the expected peaks of decode steps of ``rows`` rows.

    No bank gets worse. Every device and every expert keeps its number of copies. ``loads``
    [num_banks, num_experts] sum to 1 in each bank.
    """
    search = _Search(start, loads, limits, top_k, rows)
    for _ in range(_ROUNDS):
        if not search.round():
            break
    return search.now


class _Search:
    """Local search for swaps; ``now`` is the best placement so far, valid after every round."""

    def __init__(
        self, start: PlacedBanks, loads: Floats, limits: Limits, top_k: int, rows: int
    ) -> None:
        self.now = start.copy()
        self._loads = loads
        self._limits = limits
        speeds = limits.speeds
        self._active = activation(loads, top_k, rows)
        self._watched = [(self._active, 0.0)]
        self._watched += [(activation(loads, top_k, rows * n), _SLACK) for n in _LARGER]
        self._most = [
            expected_peak(active, start.primary, speeds) * (1.0 + slack) + 1e-9
            for active, slack in self._watched
        ]
        self._least = np.minimum(balancedness(start.slot_loads, speeds), _BALANCED)
        self._grid = Grid.of(speeds, start.slots.shape[2] + 1)
        self._tried = np.tile(speeds == 0, (len(loads), 1))
        self._failures = np.zeros(len(loads), dtype=np.int64)
        self._work = 0

    def round(self) -> bool:
        """Make one good swap in each open bank that has one; return False at the search's end.

        A bank is open until too many of its devices in succession had no good swap. The search ends
        without open banks, or after ``_MOST_WORK``.
        """
        is_open = (self._failures < _FAILURES) & ~self._tried.all(1)
        banks = np.nonzero(is_open)[0]
        if not len(banks) or self._work > _MOST_WORK:
            return False
        served = self._distributions(banks)
        device = served.worst(self._tried[banks])
        by_slot, by_primary = served.gain_of_slots(device), served.gain_of_primaries(device)
        self._work += by_slot.size * len(self._grid.width)
        gain = np.concatenate([g.reshape(len(banks), -1) for g in (by_slot, by_primary)], 1)
        is_done = self._take(banks, device, gain)
        failed = banks[~is_done]
        self._tried[failed, device[~is_done]] = True
        self._failures[failed] += 1
        self._tried[banks[is_done]] = self._limits.speeds == 0
        self._failures[banks[is_done]] = 0
        return True

    def _distributions(self, banks: Ints) -> ServedDistributions:
        return ServedDistributions(
            slots=self.now.slots[banks],
            primary=self.now.primary[banks],
            active=self._active[banks],
            grid=self._grid,
            nodes=self._limits.nodes if self._limits.two_nodes else None,
        )

    def _take(self, banks: Ints, device: Ints, gain: Floats) -> Bools:
        """Make the best swap of each bank's ``device`` that passes the checks.

        Returns whether a swap was made, [open banks]. ``gain`` [open banks, swaps] has the gains
        of swaps of two slots, then of primary copies.
        """
        is_done = np.zeros(len(banks), dtype=bool)
        for _ in range(_TRIES):
            best = gain.argmax(1)
            tried = np.nonzero(~is_done & (gain[np.arange(len(banks)), best] > _LEAST_GAIN))[0]
            if not len(tried):
                break
            found = self._exchanged(banks[tried], device[tried], best[tried])
            passes = self._passes(banks[tried], found)
            chosen = banks[tried[passes]]
            self.now.slots[chosen] = found.slots[passes]
            self.now.primary[chosen] = found.primary[passes]
            self.now.slot_loads[chosen] = found.slot_loads[passes]
            is_done[tried[passes]] = True
            gain[tried, best[tried]] = -np.inf
        return is_done

    def _exchanged(self, banks: Ints, device: Ints, chosen: Ints) -> PlacedBanks:
        """Return ``banks`` after the swaps of ``device`` with index ``chosen`` in ``gain``.

        The slot loads of the result are still the loads before the swaps.
        """
        _, devices, width = self.now.slots.shape
        slots, primary = self.now.slots[banks], self.now.primary[banks]
        swaps = width * devices * width
        for b, (here, choice) in enumerate(zip(device.tolist(), chosen.tolist(), strict=True)):
            if choice >= swaps:
                slot, there = divmod(choice - swaps, devices)
                primary[b, slots[b, here, slot]] = there
                continue
            slot, other = divmod(choice, devices * width)
            there, place = divmod(other, width)
            gives, takes = int(slots[b, here, slot]), int(slots[b, there, place])
            slots[b, here, slot], slots[b, there, place] = takes, gives
            if primary[b, gives] == here:
                primary[b, gives] = there
            if primary[b, takes] == there:
                primary[b, takes] = here
        return PlacedBanks(slots=slots, primary=primary, slot_loads=self.now.slot_loads[banks])

    def _passes(self, banks: Ints, found: PlacedBanks) -> Bools:
        """Return whether swapped banks are acceptable, [banks], and solve their slot loads.

        A bank is acceptable if its peak is not much worse for any batch size and it stays balanced.
        """
        speeds = self._limits.speeds
        passes = np.ones(len(banks), dtype=bool)
        for (active, _), most in zip(self._watched, self._most, strict=True):
            passes &= expected_peak(active[banks], found.primary, speeds) <= most[banks]
        has_moved = (found.slots != self.now.slots[banks]).any((1, 2))
        solved = np.nonzero(passes & has_moved)[0]
        if len(solved):
            self._work += len(solved) * _SOLVING * len(speeds) ** 2
            found.slot_loads[solved] = solve(
                found.slots[solved], self._loads[banks[solved]], speeds
            )
        return passes & (balancedness(found.slot_loads, speeds) >= self._least[banks])


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Points t (in slots of a device of mean speed) at which distributions are evaluated."""

    count: Ints
    """Number of slots that each device serves within t, for each point t, [num_devices, points]."""
    width: Floats
    """Width of the interval that each point stands for, [points]."""

    @classmethod
    def of(cls, speeds: Floats, size: int) -> Grid:
        """Return the grid for devices of these ``speeds`` that serve less than ``size`` experts."""
        relative = relative_speeds(speeds)
        if np.allclose(relative, 1.0):
            count = np.tile(np.arange(size), (len(speeds), 1))
            return cls(count=count, width=np.ones(size))
        end = size / float(relative.min())
        points = (np.arange(_THRESHOLDS) + 0.5) * end / _THRESHOLDS
        count = np.floor(points * relative[:, None] + 1e-9).astype(np.int64)
        width = np.full(_THRESHOLDS, end / _THRESHOLDS)
        return cls(count=np.minimum(count, size - 1), width=width)


class ServedDistributions:
    """Distributions of the number of slots that devices serve in a step, and the gains of swaps."""

    def __init__(
        self, *, slots: Ints, primary: Ints, active: Floats, grid: Grid, nodes: Ints | None
    ) -> None:
        """Compute the distributions of the primary copies of ``slots``.

        ``active`` [banks, experts] are probabilities that a step activates an expert. ``nodes``
        [num_devices] restricts swaps to slots of one node; None allows swaps between all devices.
        """
        banks, devices, width = slots.shape
        self._slots = slots.reshape(banks, -1)
        self._grid = grid
        self._nodes = nodes
        self._rows = np.arange(banks)
        self._device = np.repeat(np.arange(devices), width)
        self._is_held = self._slots != FREE_SLOT
        expert = np.maximum(self._slots, 0)
        row = self._rows[:, None]
        is_primary = self._is_held & (primary[row, expert] == self._device)
        self._chance = np.where(is_primary, active[row, expert], 0.0)
        found = sum_distribution(self._chance.reshape(banks, devices, width))
        each = np.broadcast_to(found[:, :, None], (banks, devices, width, width + 1))
        without = _without_expert(each.reshape(banks, -1, width + 1), self._chance)
        self._cdf = np.minimum(found.cumsum(2), 1.0)
        self._cdf_without = np.minimum(without.cumsum(2), 1.0)
        below = _at(self._cdf, grid.count)
        self._log = np.log(np.maximum(below, _TINY))
        self._log_all = self._log.sum(1)
        self._value = (np.exp(self._log_all) * grid.width).sum(1)
        self._holds = np.zeros((banks, active.shape[1], devices), dtype=bool)
        bank, slot = np.nonzero(self._is_held)
        self._holds[bank, self._slots[bank, slot], self._device[slot]] = True

    def worst(self, skipped: Bools) -> Ints:
        """Return the device of each bank that raises the peak most, except ``skipped`` devices.

        The shape of ``skipped`` is [banks, devices].
        """
        weight = np.exp(self._log_all) * self._grid.width
        share = -(self._log * weight[:, None]).sum(2)
        return np.asarray(np.where(skipped, -np.inf, share).argmax(1))

    def gain_of_slots(self, device: Ints) -> Floats:
        """Return the gain of swapping two slots, [banks, slots of ``device``, all slots].

        Negative infinity if the swap is not allowed.
        """
        rows, own, there = self._rows[:, None], self._own(device), self._device
        here_count = self._grid.count[device][:, None]
        mine = self._cdf_without[rows, own]
        mine = _with_expert(_at(mine, here_count), _before(mine, here_count), self._chance)
        count = self._grid.count[there]
        theirs = _with_expert(
            _at(self._cdf_without, count),
            _before(self._cdf_without, count),
            self._chance[rows, own],
        ).swapaxes(1, 2)
        gain = (self._rest(device)[:, there][:, None] * mine * theirs).sum(3)
        may = self._may_exchange(device, own)
        return np.where(may, gain - self._value[:, None, None], -np.inf)

    def gain_of_primaries(self, device: Ints) -> Floats:
        """Return the gain if another copy becomes primary, [banks, slots of ``device``, devices].

        Negative infinity if the slot has no primary copy, or the device no copy of its expert.
        """
        rows, own, count = self._rows[:, None], self._own(device), self._grid.count
        chance = self._chance[rows, own]
        mine = _at(self._cdf_without[rows, own], count[device][:, None])[:, :, None]
        theirs = _with_expert(_at(self._cdf, count), _before(self._cdf, count), chance).swapaxes(
            1, 2
        )
        gain = (self._rest(device)[:, None] * mine * theirs).sum(3)
        may = self._holds[rows, np.maximum(self._slots[rows, own], 0)] & (chance > 0)[:, :, None]
        may[self._rows, :, device] = False
        return np.where(may, gain - self._value[:, None, None], -np.inf)

    def _own(self, device: Ints) -> Ints:
        """Return the indices of the slots of ``device`` [banks], as [banks, own slots]."""
        width = self._slots.shape[1] // len(self._grid.count)
        return np.asarray(device[:, None] * width + np.arange(width))

    def _rest(self, device: Ints) -> Floats:
        """Return the probability that all devices but two serve <= t slots, times t's width.

        The two are ``device`` and the device of axis 1; the shape is [banks, devices, points].
        """
        rest = self._log_all[:, None] - self._log[self._rows, device][:, None] - self._log
        return np.asarray(np.exp(np.minimum(rest, 0.0)) * self._grid.width)

    def _may_exchange(self, device: Ints, own: Ints) -> Bools:
        """Return whether a swap of two slots is allowed, [banks, own slots, all slots].

        Both slots must hold experts that have no copy at their destination yet. If ``nodes`` are
        given, both slots must be on one node.
        """
        rows = self._rows[:, None]
        expert = np.maximum(self._slots, 0)
        is_new = ~self._holds[rows, expert, device[:, None]] & self._is_held
        may = ~self._holds[rows, expert[rows, own]][:, :, self._device] & is_new[:, None]
        if self._nodes is not None:
            may &= (self._nodes[device][:, None] == self._nodes[self._device])[:, None]
        return np.asarray(may & self._is_held[rows, own][:, :, None])


def _at(cdf: Floats, count: Ints) -> Floats:
    """Return the values of ``cdf`` [..., size] at the indices ``count`` [..., points]."""
    shape = (*cdf.shape[:-1], count.shape[-1])
    return np.take_along_axis(cdf, np.broadcast_to(count, shape), -1)


def _before(cdf: Floats, count: Ints) -> Floats:
    """Return the values of ``cdf`` [..., size] at ``count - 1``; 0 where ``count`` is 0."""
    return np.where(count > 0, _at(cdf, np.maximum(count - 1, 0)), 0.0)


def _with_expert(at: Floats, before: Floats, chance: Floats) -> Floats:
    """Return distribution values after adding one expert of ``chance`` [banks, experts].

    ``at`` and ``before`` [banks, distributions, points] are the values at a count and at one less.
    Axis 2 of the result is the added expert.
    """
    return np.asarray(at[:, :, None] + chance[:, None, :, None] * (before - at)[:, :, None])


def _without_expert(pmf: Floats, chance: Floats) -> Floats:
    """Return distributions [..., size] of sums without one of their Bernoulli variables.

    ``chance`` [...] is the probability of the variable to remove. The variable is divided out from
    the numerically stable end.
    """
    size = pmf.shape[-1]
    rising, falling = np.zeros_like(pmf), np.zeros_like(pmf)
    low, high = np.minimum(chance, 0.5), np.maximum(chance, 0.5)
    for i in range(size - 1):
        before = rising[..., i - 1] if i else 0.0
        rising[..., i] = (pmf[..., i] - low * before) / (1.0 - low)
    for i in range(size - 1, 0, -1):
        falling[..., i - 1] = (pmf[..., i] - (1.0 - high) * falling[..., i]) / high
    return np.maximum(np.where((chance < 0.5)[..., None], rising, falling), 0.0)
