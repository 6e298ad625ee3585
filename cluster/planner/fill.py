"""Makes a placement from scratch: the number of copies of each expert, and their devices.

Every device first gets its part of the experts (their primary copies, which serve decode steps),
then redundant copies of the busiest experts in its spare slots. A good placement balances the
loads. Its copies also connect all devices, so that new shares alone can later move load from any
device to any other: a redundant copy goes to a device that is not yet connected with the device of
the primary copy.

All banks are filled together, one copy of each bank per round.
"""

from __future__ import annotations

import numpy as np

from cluster.core.placement import FREE_SLOT
from cluster.planner.base import Bools, Floats, Ints


def fill(
    loads: Floats, capacities: Ints, speeds: Floats, nodes: Ints, two_nodes: bool
) -> tuple[Ints, Ints]:
    """Place experts from scratch: return the arrays ``slots`` and ``primary`` (``planner.base``).

    ``two_nodes``: whether each expert must have copies on two nodes.
    """
    width = int(capacities.max())
    capacities = np.minimum(capacities, loads.shape[1])
    quota = primary_quota(capacities, speeds, loads.shape[1])
    replicas = _replicas(loads, int(capacities.sum()), capacities, two_nodes)
    board = _PartialPlacement(loads, quota, capacities, speeds, nodes)
    expert, is_primary = _copies(loads, replicas)
    for step in range(expert.shape[1]):
        board.put(expert[:, step], is_primary[:, step], loads, replicas)
    if two_nodes:
        for b in np.nonzero((board.num_nodes() < 2).any(1))[0]:
            board.held[b], board.primary[b] = _wrapped(loads[b], capacities, nodes)
    board.use_leftovers(loads)
    return board.slots(width), board.primary


def primary_quota(capacities: Ints, speeds: Floats, num_experts: int) -> Ints:
    """Return the number of primary copies for each device, by speed and number of slots.

    The shape is [num_devices].
    """
    quota = np.zeros(len(capacities), dtype=np.int64)
    for _ in range(num_experts):
        ahead = np.where(quota < capacities, (quota + 1) / np.maximum(speeds, 1e-12), np.inf)
        quota[int(ahead.argmin())] += 1
    return quota


def can_use_two_nodes(capacities: Ints, nodes: Ints, num_experts: int) -> bool:
    """Return whether the slots suffice for copies of every expert on two nodes."""
    room = np.minimum(np.bincount(nodes, capacities), num_experts)
    return bool(room.sum() >= 2 * num_experts)


def _replicas(loads: Floats, total: int, capacities: Ints, two_nodes: bool) -> Ints:
    """Return the number of copies of each expert, [num_banks, num_experts].

    Each further copy goes to the expert with the largest load per copy.
    """
    banks, experts = loads.shape
    count = np.full(loads.shape, 2 if two_nodes else 1)
    limit = int((capacities > 0).sum())
    rows = np.arange(banks)
    for _ in range(min(total, experts * limit) - int(count[0].sum())):
        busiest = np.where(count < limit, loads / count, -1.0).argmax(1)
        count[rows, busiest] += 1
    return count


def _copies(loads: Floats, replicas: Ints) -> tuple[Ints, Bools]:
    """Return the expert of each copy in the order of placing, and whether the copy is primary.

    Experts with several copies come first, then by falling load. The shapes are [num_banks,
    num_copies].
    """
    order = np.lexsort((-loads, replicas == 1), axis=1)
    rows = [np.repeat(o, r[o]) for o, r in zip(order, replicas, strict=True)]
    expert = np.array(rows)
    is_primary = np.ones(expert.shape, dtype=bool)
    is_primary[:, 1:] = expert[:, 1:] != expert[:, :-1]
    return expert, is_primary


class _PartialPlacement:
    """The placement while copies of experts are added to it."""

    def __init__(
        self, loads: Floats, quota: Ints, capacities: Ints, speeds: Floats, nodes: Ints
    ) -> None:
        banks, experts = loads.shape
        devices = len(quota)
        self.held = np.zeros((banks, experts, devices), dtype=bool)
        self.primary = np.full((banks, experts), -1)
        self._primaries_left = np.tile(quota, (banks, 1))
        self._spares_left = np.tile(capacities - quota, (banks, 1))
        self._capacities = capacities
        self._spares = np.maximum(capacities - quota, 1)
        self._quota = np.maximum(quota, 1)
        self._shared_primaries = np.zeros((banks, devices))
        self._utilization = np.zeros((banks, devices))
        self._speeds = np.maximum(speeds, 1e-12)
        self._nodes = nodes
        self._part = np.tile(np.arange(devices), (banks, 1))
        self._rows = np.arange(banks)

    def put(self, expert: Ints, is_primary: Bools, loads: Floats, replicas: Ints) -> None:
        """Place one copy of ``expert`` [banks] in each bank that has a device with room."""
        rows = self._rows
        primary = self.primary[rows, expert]
        held = self.held[rows, expert]
        room = np.where(is_primary[:, None], self._primaries_left, self._spares_left) > 0
        several = replicas[rows, expert] > 1
        as_primary = 10.0 * several[:, None] * self._shared_primaries / self._quota
        part = self._part[rows, primary][:, None]
        same_node = self._nodes[None, :] == self._nodes[primary][:, None]
        used = 1.0 - self._spares_left / self._spares
        as_spare = 100.0 * (self._part == part) + 20.0 * same_node + 10.0 * used
        cost = np.where(is_primary[:, None], as_primary, as_spare) + self._utilization
        cost = np.where(room & ~held, cost, np.inf)
        device = cost.argmin(1)
        fits = np.isfinite(cost[rows, device])
        row, device, expert = rows[fits], device[fits], expert[fits]
        is_primary, several = is_primary[fits], several[fits]
        self.held[row, expert, device] = True
        self._utilization[row, device] += (
            loads[row, expert] / replicas[row, expert] / self._speeds[device]
        )
        first, second = row[is_primary], row[~is_primary]
        self.primary[first, expert[is_primary]] = device[is_primary]
        self._primaries_left[first, device[is_primary]] -= 1
        self._shared_primaries[first, device[is_primary]] += several[is_primary]
        self._spares_left[second, device[~is_primary]] -= 1
        joined = self._part[second] == self._part[second, device[~is_primary]][:, None]
        self._part[second] = np.where(joined, part[fits][~is_primary], self._part[second])

    def num_nodes(self) -> Ints:
        """Return the number of nodes with a copy of each expert, [num_banks, num_experts]."""
        count = np.zeros(self.primary.shape, dtype=np.int64)
        for node in range(int(self._nodes.max()) + 1):
            count += self.held[:, :, self._nodes == node].any(2)
        return count

    def use_leftovers(self, loads: Floats) -> None:
        """Fill each device's remaining slots with the busiest experts that it does not hold."""
        left = self._capacities - self.held.sum(1)
        for b, d in np.argwhere(left > 0):
            missing = np.nonzero(~self.held[b, :, d])[0]
            chosen = missing[np.argsort(-loads[b, missing], kind="stable")][: left[b, d]]
            self.held[b, chosen, d] = True

    def slots(self, width: int) -> Ints:
        """Return the experts of each device in rising order, free slots last.

        The shape is [num_banks, num_devices, width].
        """
        banks, _, devices = self.held.shape
        slots = np.full((banks, devices, width), FREE_SLOT)
        bank, device, expert = np.nonzero(self.held.transpose(0, 2, 1))
        row = bank * devices + device
        start = np.searchsorted(row, np.arange(banks * devices))
        slots[bank, device, np.arange(len(row)) - start[row]] = expert
        return slots


def _wrapped(loads: Floats, capacities: Ints, nodes: Ints) -> tuple[Bools, Ints]:
    """Return copies of every expert of one bank on two nodes, even if slots are scarce.

    The nodes in turn take the next experts from an endless repetition of the list of experts: no
    node takes an expert twice, and after two repetitions each expert is on two nodes. Returns
    whether each device holds each expert, [experts, devices], and the primary devices.

    Source: the wrap-around rule of McNaughton (1959).
    """
    experts = len(loads)
    room = np.minimum(np.bincount(nodes, capacities), experts).astype(np.int64)
    order = np.argsort(-loads, kind="stable")
    order = np.concatenate([order[::2], order[1::2][::-1]])
    held = np.zeros((experts, len(nodes)), dtype=bool)
    primary = np.full(experts, -1)
    at = 0
    for node in np.argsort(-room, kind="stable"):
        chosen = order[np.arange(at, at + room[node]) % experts]
        at += int(room[node])
        left = np.where(nodes == node, capacities, 0)
        utilization = np.zeros(len(nodes))
        for e in chosen[np.argsort(-loads[chosen], kind="stable")]:
            device = int(np.where(left > 0, utilization, np.inf).argmin())
            held[e, device] = True
            left[device] -= 1
            utilization[device] += loads[e]
            primary[e] = device if primary[e] < 0 else primary[e]
    return held, primary
