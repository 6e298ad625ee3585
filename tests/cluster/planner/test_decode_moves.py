"""Moves for decode steps: the busiest device gains, and every rule is kept."""

from __future__ import annotations

import random

import pytest

from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import BankPlacement, BankShape, ExpertPlacement, contiguous
from cluster.planner.base import PlannedDevice, PlannedTopology
from cluster.planner.decode_moves import improved
from cluster.planner.stages import held_by

EXPERTS = 16
SHAPES = tuple(BankShape(bank="mlp", layer=i, num_experts=EXPERTS) for i in range(3))


def profile(seed: int) -> LoadProfile:
    rng = random.Random(seed)
    banks = tuple(
        BankLoad(bank="mlp", layer=i, counts=tuple(rng.paretovariate(1.2) for _ in range(EXPERTS)))
        for i in range(len(SHAPES))
    )
    return LoadProfile(model="demo", top_k=2, tokens=100, banks=banks)


def peak(bank: BankPlacement, counts: tuple[float, ...], devices: int) -> float:
    """Pairs of the busiest device in decode steps."""
    total = [0.0] * devices
    for expert, device in enumerate(bank.decode_device):
        total[device] += counts[expert]
    return max(total)


def moved_slots(before: ExpertPlacement, after: ExpertPlacement) -> int:
    return sum(
        len(held_by(new, device) - held_by(old, device))
        for old, new in zip(before.banks, after.banks, strict=True)
        for device in range(old.num_devices)
    )


def check_improved(
    before: ExpertPlacement, topology: PlannedTopology, load: LoadProfile, budget: int
) -> ExpertPlacement:
    after = improved(load, topology, before, budget=budget, rows=32, slot_tokens=0.0)
    assert after == improved(load, topology, before, budget=budget, rows=32, slot_tokens=0.0)
    assert moved_slots(before, after) <= budget
    devices = topology.num_devices
    for old, new, counts in zip(before.banks, after.banks, load.banks, strict=True):
        capacities = topology.capacities(EXPERTS).tolist()
        assert all(len(held_by(new, d)) <= capacities[d] for d in range(devices))
        assert peak(new, counts.counts, devices) <= peak(old, counts.counts, devices) + 1e-9
        least = min(2, *old.replica_count)
        assert min(new.replica_count) >= least
    return after


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("budget", [0, 3, 100])
def test_no_bank_gets_worse_and_the_rules_are_kept(seed: int, budget: int) -> None:
    rng = random.Random(seed)
    redundant = rng.randint(0, 3)
    before = contiguous(SHAPES, 4, redundant)
    topology = PlannedTopology.uniform(4, redundant + rng.randint(0, 1))
    check_improved(before, topology, profile(seed), budget)


def test_it_gets_close_to_an_even_load() -> None:
    load = profile(3)
    before = contiguous(SHAPES, 4, 1)
    after = check_improved(before, PlannedTopology.uniform(4, 1), load, 100)
    for old, new, counts in zip(before.banks, after.banks, load.banks, strict=True):
        mean = sum(counts.counts) / 4
        best = max(mean, max(counts.counts))
        assert peak(new, counts.counts, 4) <= max(1.25 * best, 0.0)
        assert peak(new, counts.counts, 4) < peak(old, counts.counts, 4)


def test_a_device_without_slots_gets_nothing() -> None:
    before = contiguous(SHAPES, 4, 6).without_devices(frozenset({2}), 5)
    assert before is not None
    devices = tuple(PlannedDevice(num_expert_slots=0 if d == 2 else 10) for d in range(4))
    after = check_improved(before, PlannedTopology(devices=devices), profile(1), 50)
    assert all(held_by(bank, 2) == frozenset() for bank in after.banks)
