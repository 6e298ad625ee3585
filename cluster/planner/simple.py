"""The two plans that look at no load: experts in order, and experts at random."""

from __future__ import annotations

import numpy as np

from cluster.config_checks import check
from cluster.load_profile import LoadProfile
from cluster.placement import BankShape, ExpertPlacement, contiguous
from cluster.planner.assess import assess
from cluster.planner.base import Ints, Plan, PlannedTopology
from cluster.planner.eplb import equally_shared


def contiguous_plan(
    profile: LoadProfile, topology: PlannedTopology, current: ExpertPlacement | None = None
) -> Plan:
    """Experts in order, a block on each device; what a cluster starts with that knows no load.

    Raises ``ConfigError`` for devices that say their number of slots: blocks are equal.
    """
    own = [d.num_expert_slots for d in topology.devices if d.num_expert_slots is not None]
    check(not own, "num_expert_slots", own, "must not be given for a contiguous plan")
    shapes = [
        BankShape(bank=b.bank, layer=b.layer, num_experts=len(b.counts)) for b in profile.banks
    ]
    epoch = 1 if current is None else current.epoch + 1
    placement = contiguous(shapes, topology.num_devices, topology.num_redundant, epoch)
    return assess(profile, topology, placement, current)


def random_plan(
    profile: LoadProfile,
    topology: PlannedTopology,
    current: ExpertPlacement | None = None,
    seed: int = 0,
) -> Plan:
    """Experts in random order, then random second copies that are new to their device."""
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
