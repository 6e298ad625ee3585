"""Computes the decode table: the one copy of each expert that serves decode steps.

The cost of a decode step is the number of activated slots of the worst device. Each expert is
activated with a probability q_e, so the table should minimize the expected maximum over devices of
a sum of Bernoulli variables. This is at most ``log(sum_d M_d) / s``, where M_d is the moment
generating function of device d's sum, a product over its experts:

    log M_d(s) = sum_e log(1 + q_e (e^s - 1)),    q_e = 1 - (1 - p_e)^rows

Therefore each expert gets its term of the sum as a weight, and the table balances the weights of
the devices. A rarely used expert weighs more than its mean because it varies more.
"""

from __future__ import annotations

import math

import numpy as np

from cluster.core.placement import FREE_SLOT
from cluster.planner.base import Floats, Ints, relative_speeds
from cluster.planner.cost import activation, expected_peak

_S = 3.0
"""Argument s of the moment generating functions of activated slots, good for 4 to 64 devices."""
_SWEEPS = 3
_PATHS = 12
"""Maximum number of paths along which experts are exchanged in each bank."""


def weights(loads: Floats, top_k: int, rows: int) -> Floats:
    """Return the weight of each expert in decode steps of ``rows`` rows, [num_banks, num_experts].

    The weight is the expert's term in the logarithm of its device's moment generating function.
    """
    return np.asarray(np.log1p(activation(loads, top_k, rows) * (math.exp(_S) - 1.0)))


def assign(
    slots: Ints, loads: Floats, speeds: Floats, primary: Ints, top_k: int, rows: int
) -> Ints:
    """Return the decode devices (of primary copies) that are best for steps of ``rows`` rows.

    A bank keeps ``primary`` if the change would make these steps or larger batches worse.
    """
    weight = weights(loads, top_k, rows)
    relative = relative_speeds(speeds)
    copies = _copy_table(slots, loads.shape[1])
    table = _swept(copies, weight, relative, primary)
    for b in range(len(table)):
        _exchange_along_paths(copies[b], weight[b], relative, table[b])
    is_better = np.ones(len(table), dtype=bool)
    for batch in (rows, 4 * rows, 16 * rows):
        active = activation(loads, top_k, batch)
        before = expected_peak(active, primary, speeds)
        is_better &= expected_peak(active, table, speeds) <= before + 1e-9
    return np.where(is_better[:, None], table, primary)


def _copy_table(slots: Ints, num_experts: int) -> Ints:
    """Return the devices of each expert in rising order, padded with -1.

    The shape is [num_banks, num_experts, largest number of copies].
    """
    banks = len(slots)
    bank, device, slot = np.nonzero(slots != FREE_SLOT)
    expert = bank * num_experts + slots[bank, device, slot]
    order = np.argsort(expert, kind="stable")
    expert, device = expert[order], device[order]
    place = np.arange(len(expert)) - np.searchsorted(expert, expert)
    table = np.full((banks * num_experts, int(place.max()) + 1), -1)
    table[expert, place] = device
    return table.reshape(banks, num_experts, -1)


def _swept(copies: Ints, weight: Floats, relative: Floats, primary: Ints) -> Ints:
    """Return decode devices after sweeps that assign each expert to its lightest device.

    A sweep visits the experts with several copies, the heaviest first.
    """
    banks = len(copies)
    rows = np.arange(banks)
    table = primary.copy()
    load = np.zeros((banks, len(relative)))
    np.add.at(load, (rows[:, None], table), weight)
    several = (copies >= 0).sum(2) > 1
    order = np.lexsort((-weight, ~several), axis=1)
    for _ in range(_SWEEPS):
        before = table.copy()
        for step in range(int(several.sum(1).max())):
            expert = order[:, step]
            w = weight[rows, expert]
            now = table[rows, expert]
            load[rows, now] -= w
            places = copies[rows, expert]
            after = (load[rows[:, None], places] + w[:, None]) / relative[places]
            best = places[rows, np.where(places >= 0, after, np.inf).argmin(1)]
            stays = (load[rows, now] + w) / relative[now] <= after.min(1) + 1e-12
            best = np.where(stays, now, best)
            table[rows, expert] = best
            load[rows, best] += w
        if (table == before).all():
            break
    return table


def _exchange_along_paths(copies: Ints, weight: Floats, relative: Floats, table: Ints) -> None:
    """Move experts of one bank along a path from a heavy device to a light one; change ``table``.

    An expert without a copy on the lightest device can move to a third device, from which another
    expert then moves on.
    """
    several = np.nonzero(copies[:, 1] >= 0)[0].tolist() if copies.shape[1] > 1 else []
    devices = len(relative)
    load = np.bincount(table, weight, devices).astype(np.float64)
    for _ in range(_PATHS):
        found = _better_path(several, copies, weight, relative, table, load)
        if found is None:
            return
        for expert, device in found:
            load[table[expert]] -= weight[expert]
            load[device] += weight[expert]
            table[expert] = device


def _better_path(
    several: list[int],
    copies: Ints,
    weight: Floats,
    relative: Floats,
    table: Ints,
    load: Floats,
) -> list[tuple[int, int]] | None:
    """Return the shortest path of moves (expert, device) with a positive gain; None without one.

    The search is breadth-first and begins at the heaviest device.
    """
    utilization = load / relative
    start = int(utilization.argmax())
    leaving: dict[int, list[int]] = {}
    for e in several:
        leaving.setdefault(int(table[e]), []).append(e)
    path: dict[int, list[tuple[int, int]]] = {start: []}
    queue = [start]
    while queue:
        at = queue.pop(0)
        for e in leaving.get(at, ()):
            for device in copies[e].tolist():
                if device < 0 or device in path:
                    continue
                path[device] = [*path[at], (e, device)]
                fits = (load[device] + weight[e]) / relative[device] < utilization[start]
                if fits and _gain(path[device], start, weight, relative, load) > 1e-9:
                    return path[device]
                queue.append(device)
    return None


def _gain(
    path: list[tuple[int, int]], start: int, weight: Floats, relative: Floats, load: Floats
) -> float:
    """Return by how much a path of moves reduces the sum of the moment generating functions.

    The unit is the value of the device ``start``, from which the path leads.
    """
    after = {start: float(load[start])}
    at = start
    for expert, device in path:
        after[at] = after.get(at, float(load[at])) - float(weight[expert])
        after[device] = after.get(device, float(load[device])) + float(weight[expert])
        at = device
    top = float(load[start] / relative[start])
    return sum(
        math.exp(load[d] / relative[d] - top) - math.exp(new / relative[d] - top)
        for d, new in after.items()
    )
