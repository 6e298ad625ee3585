"""Cost of a placement: utilization of its devices in prefill, activated slots in decode steps.

All devices run the same layer at a time, so the cost of a placement is the sum over banks of the
cost of the busiest device.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from cluster.planner.base import Floats, Ints, relative_speeds


def utilization(slot_loads: Floats, speeds: Floats) -> Floats:
    """Return the load of each device divided by its speed, [num_banks, num_devices].

    All values are 1 under perfect balance.
    """
    return np.asarray(slot_loads.sum(-1) / np.maximum(speeds, 1e-9))


def balancedness(slot_loads: Floats, speeds: Floats) -> Floats:
    """Return the balancedness of each bank: mean over maximum utilization, [num_banks].

    Utilization is load over speed; the mean is weighted by speed. 1 is perfect balance.
    """
    return np.asarray(1.0 / utilization(slot_loads, speeds).max(1))


def activation(loads: Floats, top_k: int, rows: int) -> Floats:
    """Return the probability that ``rows`` rows activate each expert, in the shape of ``loads``.

    It is ``1 - (1 - p)^rows`` if one row activates the expert with probability p.
    """
    return np.asarray(1.0 - (1.0 - np.minimum(loads * top_k, 1.0)) ** rows)


def expected_peak(active: Floats, primary: Ints, speeds: Floats) -> Floats:
    """Return the expected number of activated slots of the busiest device, [num_banks].

    The unit is slots of a device of mean speed. ``active`` [num_banks, num_experts] are the
    probabilities of activation, treated as independent. The distribution of each device's sum is
    exact; devices are treated as independent.
    """
    chance = _by_device(active, primary, len(speeds))
    below = np.minimum(sum_distribution(chance).cumsum(2), 1.0)
    relative = relative_speeds(speeds)
    if np.allclose(relative, 1.0):
        return np.asarray((1.0 - below[:, :, :-1].prod(1)).sum(1))
    return _weighted_peak(below, relative)


def _by_device(active: Floats, primary: Ints, devices: int) -> Floats:
    """Return the probabilities ``active`` of each device's primary copies, padded with 0.

    The shape is [num_banks, num_devices, largest number of primary copies].
    """
    banks = len(active)
    row = (primary + devices * np.arange(banks)[:, None]).ravel()
    order = np.argsort(row, kind="stable")
    row = row[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    chance = np.zeros((banks * devices, int(place.max()) + 1))
    chance[row, place] = active.ravel()[order]
    return chance.reshape(banks, devices, -1)


def sum_distribution(chance: Floats) -> Floats:
    """Return the distribution [..., n + 1] of how many of n independent events happen.

    ``chance`` [..., n] has the probabilities of the events.
    """
    found = np.zeros((*chance.shape[:-1], chance.shape[-1] + 1))
    found[..., 0] = 1.0
    for i in range(chance.shape[-1]):
        p = chance[..., i, None]
        found[..., 1:] = found[..., 1:] * (1.0 - p) + found[..., :-1] * p
        found[..., 0] *= 1.0 - p[..., 0]
    return found


def _weighted_peak(below: Floats, relative: Floats) -> Floats:
    """Return the expected maximum over devices of activated slots over relative speed.

    This is the integral of 1 - P(all devices are below t). ``below`` [num_banks, num_devices,
    counts] are the cumulative distributions of activated slots.
    """
    steps = np.unique((np.arange(below.shape[2])[:, None] / relative).ravel())
    total = np.zeros(len(below))
    for low, high in itertools.pairwise(steps.tolist()):
        count = np.minimum(np.floor(low * relative + 1e-9).astype(np.int64), below.shape[2] - 1)
        total += (1.0 - below[:, np.arange(len(relative)), count].prod(1)) * (high - low)
    return total


def slots_over_floor(loads: Floats, primary: Ints, speeds: Floats, top_k: int, rows: int) -> float:
    """Return the expected peak of activated slots over its minimum, averaged over the banks.

    The minimum is ``ceil(expected activated experts / devices)``.
    """
    active = activation(loads, top_k, rows)
    devices = int((speeds > 0).sum())
    floor = [math.ceil(round(float(u) / devices, 9)) for u in active.sum(1)]
    return float((expected_peak(active, primary, speeds) / floor).mean())
