"""Decode tables: the expected worst device, exactly, and tables that lower it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.placement.random_plan import random_plan
from cluster.planner import cost, decode, mesh
from cluster.planner.base import Floats, PlannedTopology, normalised, slot_arrays
from tests.cluster.planner.planner_cases import Problem, make_profile, problems

PROPERTY = settings(max_examples=25, deadline=None)


def brute_force_peak(active: Floats, primary: list[int], speeds: Floats) -> float:
    """Over all sets of active experts."""
    relative = speeds * (speeds > 0).sum()
    total = 0.0
    for chosen in itertools.product([0, 1], repeat=len(active)):
        chance = np.where(np.array(chosen) == 1, active, 1 - active).prod()
        count = np.bincount(primary, weights=chosen, minlength=len(speeds))
        total += chance * (count[speeds > 0] / relative[speeds > 0]).max()
    return total


@pytest.mark.parametrize(
    "speeds", [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5]]
)
def test_the_expected_peak_is_exact(speeds: list[float]) -> None:
    generator = np.random.default_rng(2)
    active = generator.random((2, 7))
    primary = np.array([[1, 2, 1, 2, 1, 1, 2], [1, 1, 2, 2, 2, 1, 2]])
    found = cost.expected_peak(active, primary, np.array(speeds))
    for b in range(2):
        expected = brute_force_peak(active[b], primary[b].tolist(), np.array(speeds))
        assert found[b] == pytest.approx(expected)


def test_a_batch_activates_what_it_touches() -> None:
    found = cost.activation(np.array([[0.5, 0.25, 0.25, 0.0]]), top_k=2, rows=3)
    assert found[0] == pytest.approx([1.0, 0.875, 0.875, 0.0])


@PROPERTY
@given(problems())
def test_a_table_is_on_copies_and_no_worse(problem: Problem) -> None:
    profile, topology = problem.profile, problem.topology
    experts = len(profile.banks[0].counts)
    speeds = topology.speeds(experts)
    slots, primary = slot_arrays(
        random_plan(profile, topology).placement.banks, topology.capacities(experts)
    )
    loads = normalised([b.counts for b in profile.banks])
    table = decode.assign(slots, loads, speeds, primary, profile.top_k, rows=4)
    for b, row in enumerate(table.tolist()):
        assert all(e in slots[b, device] for e, device in enumerate(row))
    for rows in (4, 16, 64):
        active = cost.activation(loads, profile.top_k, rows)
        before = cost.expected_peak(active, primary, speeds)
        assert (cost.expected_peak(active, table, speeds) <= before + 1e-9).all()


def test_an_expert_is_passed_on_where_the_lightest_device_has_no_copy_of_it() -> None:
    slots = np.array([[[0, 1, 2], [1, 3, -1], [3, -1, -1]]])
    primary = np.array([[0, 0, 0, 1]])
    table = decode.assign(slots, np.full((1, 4), 0.25), np.full(3, 1 / 3), primary, 4, rows=64)
    assert np.bincount(table[0]).tolist() == [2, 1, 1]


@pytest.mark.parametrize("devices", [4, 8, 16])
def test_spare_slots_never_make_decode_steps_dearer(devices: int) -> None:
    generator = np.random.default_rng(5)
    profile = make_profile(np.exp(0.7 * generator.normal(size=(6, 64))), top_k=8)
    alone = mesh.plan(profile, PlannedTopology.uniform(devices))
    spare = mesh.plan(profile, PlannedTopology.uniform(devices, num_redundant=1))
    for rows, peak in spare.decode_slots_over_floor.items():
        assert peak <= alone.decode_slots_over_floor[rows] + 1e-3
