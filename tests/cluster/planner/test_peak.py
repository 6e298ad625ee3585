"""Swaps for decode steps: what they are said to gain, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.placement.random_plan import random_plan
from cluster.planner import mesh
from cluster.planner.base import Floats, PlannedDevice, PlannedTopology, normalised, slot_arrays
from cluster.planner.cost import activation, balancedness, expected_peak
from cluster.planner.edits import Limits
from cluster.planner.peak import Grid, ServedDistributions, lower_peaks
from cluster.planner.search import PlacedBanks, solve
from tests.cluster.planner.planner_cases import Problem, make_profile, problems

PROPERTY = settings(max_examples=25, deadline=None)


def limits_of(topology: PlannedTopology, experts: int) -> Limits:
    """Where every expert may have copies anywhere."""
    capacities = topology.capacities(experts)
    return Limits(
        usable=np.arange(int(capacities.max()))[None] < capacities[:, None],
        speeds=topology.speeds(experts),
        nodes=topology.domains,
        two_nodes=False,
    )


def start_of(problem: Problem) -> tuple[PlacedBanks, Floats, Limits]:
    """A random placement with its best shares, the loads, and the limits."""
    profile, topology = problem.profile, problem.topology
    limits = limits_of(topology, len(profile.banks[0].counts))
    loads = normalised([b.counts for b in profile.banks])
    plan = random_plan(profile, topology)
    slots, primary = slot_arrays(
        plan.placement.banks, topology.capacities(len(profile.banks[0].counts))
    )
    return (
        PlacedBanks(slots=slots, primary=primary, slot_loads=solve(slots, loads, limits.speeds)),
        loads,
        limits,
    )


def test_a_gain_is_what_the_expected_peak_loses() -> None:
    profile = make_profile(np.exp(np.random.default_rng(1).normal(size=(2, 12))), top_k=2)
    problem = Problem(profile=profile, later=profile, topology=PlannedTopology.uniform(3, 2))
    start, loads, limits = start_of(problem)
    active = activation(loads, 2, 4)
    grid = Grid.of(limits.speeds, start.slots.shape[2] + 1)
    served = ServedDistributions(
        slots=start.slots, primary=start.primary, active=active, grid=grid, nodes=None
    )
    device = served.worst(np.zeros((2, 3), dtype=bool))
    before = expected_peak(active, start.primary, limits.speeds)
    width, found = start.slots.shape[2], 0
    for b in range(2):
        for slot, other in np.argwhere(np.isfinite(served.gain_of_slots(device)[b])).tolist():
            primary = start.primary[b : b + 1].copy()
            there = other // width
            gives, takes = start.slots[b, device[b], slot], start.slots[b, there, other % width]
            primary[0, gives] = there if primary[0, gives] == device[b] else primary[0, gives]
            primary[0, takes] = device[b] if start.primary[b, takes] == there else primary[0, takes]
            after = expected_peak(active[b : b + 1], primary, limits.speeds)[0]
            gain = served.gain_of_slots(device)[b, slot, other]
            assert gain == pytest.approx(before[b] - after, abs=1e-9)
            found += 1
        for slot, there in np.argwhere(np.isfinite(served.gain_of_primaries(device)[b])).tolist():
            primary = start.primary[b : b + 1].copy()
            primary[0, start.slots[b, device[b], slot]] = there
            after = expected_peak(active[b : b + 1], primary, limits.speeds)[0]
            gain = served.gain_of_primaries(device)[b, slot, there]
            assert gain == pytest.approx(before[b] - after, abs=1e-9)
            found += 1
    assert found > 20


@PROPERTY
@given(problems())
def test_no_bank_gets_worse_and_copies_keep_their_number(problem: Problem) -> None:
    start, loads, limits = start_of(problem)
    found = lower_peaks(start, loads, limits, problem.profile.top_k, rows=4)
    speeds = limits.speeds
    for rows, slack in ((4, 1e-8), (16, 0.0101), (64, 0.0101)):
        active = activation(loads, problem.profile.top_k, rows)
        before = expected_peak(active, start.primary, speeds)
        assert (expected_peak(active, found.primary, speeds) <= before * (1 + slack)).all()
    kept = np.minimum(balancedness(start.slot_loads, speeds), 0.998)
    assert (balancedness(found.slot_loads, speeds) >= kept - 1e-12).all()
    for b in range(len(loads)):
        for d in range(len(speeds)):
            held = [e for e in found.slots[b, d].tolist() if e >= 0]
            assert len(held) == len(set(held)) == (start.slots[b, d] >= 0).sum()
        count = np.bincount(found.slots[b][found.slots[b] >= 0], minlength=loads.shape[1])
        before_count = np.bincount(start.slots[b][start.slots[b] >= 0], minlength=loads.shape[1])
        assert (count == before_count).all()
        assert all(e in found.slots[b, d] for e, d in enumerate(found.primary[b].tolist()))


@pytest.mark.parametrize("kind", ["lognormal", "zipf", "dirichlet"])
@pytest.mark.parametrize("devices", [8, 16])
def test_it_helps_on_loads_of_any_kind(kind: str, devices: int) -> None:
    generator = np.random.default_rng(3)
    counts = {
        "lognormal": np.exp(0.8 * generator.normal(size=(4, 64))),
        "zipf": (generator.permuted(np.tile(np.arange(1.0, 65.0), (4, 1)), axis=1)) ** -0.6,
        "dirichlet": generator.dirichlet(np.full(64, 2.0), 4),
    }[kind]
    profile = make_profile(counts, top_k=8)
    plan = mesh.plan(profile, PlannedTopology.uniform(devices, 1))
    alone = mesh.plan(profile, PlannedTopology.uniform(devices))
    assert min(plan.balancedness) > 0.99
    assert plan.decode_slots_over_floor[16] < alone.decode_slots_over_floor[16]


def test_experts_stay_on_two_nodes() -> None:
    profile = make_profile(np.exp(np.random.default_rng(1).normal(size=(2, 12))), top_k=2)
    topology = PlannedTopology(
        devices=tuple(PlannedDevice(num_expert_slots=7, node=f"n{d % 2}") for d in range(4))
    )
    plan = mesh.plan(profile, topology)
    for bank in plan.placement.banks:
        for expert in range(12):
            assert len({d % 2 for d, _ in bank.logical_to_physical(expert)}) == 2
