"""A random placement as a baseline, and a count of copies that share a device with another copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.core.load_profile import LoadProfile
from cluster.core.placement import FREE_SLOT, ExpertPlacement
from cluster.planner.assess import assess
from cluster.planner.base import Ints, Plan, PlannedTopology
from cluster.planner.eplb import equally_shared


def random_plan(
    profile: LoadProfile,
    topology: PlannedTopology,
    current: ExpertPlacement | None = None,
    seed: int = 0,
) -> Plan:
    """Place experts in random order, then second copies on random devices without the expert."""
    generator = np.random.default_rng(seed)
    banks = []
    for load in profile.banks:
        capacities = topology.capacities(len(load.counts))
        maps = _random_maps(generator, len(load.counts), capacities)
        banks.append(equally_shared(load.bank, load.layer, len(load.counts), maps))
    epoch = 1 if current is None else current.epoch + 1
    placement = ExpertPlacement(epoch=epoch, banks=tuple(banks))
    return assess(profile, topology, placement, current)


def _random_maps(
    generator: np.random.Generator, num_experts: int, capacities: Ints
) -> list[list[int]]:
    left = np.minimum(capacities, num_experts)
    maps: list[list[int]] = [[] for _ in capacities]
    for expert in generator.permutation(num_experts).tolist():
        device = int(generator.choice(np.nonzero(left == left.max())[0]))
        maps[device].append(expert)
        left[device] -= 1
    for device, slots in enumerate(maps):
        others = np.setdiff1d(np.arange(num_experts), slots)
        slots += generator.permutation(others)[: left[device]].tolist()
    return maps


def siblings(bank_slots: Sequence[Sequence[int]]) -> int:
    """Number of copies that share a device with another copy of the expert."""
    held = [[e for e in slots if e != FREE_SLOT] for slots in bank_slots]
    return sum(len(slots) - len(set(slots)) for slots in held)
