"""Split weights against the exact optimum, which subsets of experts give."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.placement.random_plan import random_plan
from cluster.core.placement import FREE_SLOT
from cluster.planner import split
from cluster.planner.base import Floats, Ints, normalised, slot_arrays
from cluster.planner.cost import balancedness, utilization
from tests.cluster.planner.planner_cases import Problem, problems

PROPERTY = settings(max_examples=25, deadline=None)


def least_peak(slots: Ints, loads: Floats, speeds: Floats) -> float:
    """The lowest possible peak utilization: the densest set of experts over all their devices."""
    holders = [frozenset(np.nonzero((slots == e).any(1))[0].tolist()) for e in range(len(loads))]
    return max(
        float(loads[list(chosen)].sum())
        / float(speeds[list(frozenset().union(*(holders[e] for e in chosen)))].sum())
        for size in range(1, len(loads) + 1)
        for chosen in itertools.combinations(range(len(loads)), size)
    )


def test_two_devices_share_what_both_hold() -> None:
    slots = np.array([[[0, 1], [0, 2]]])
    slot_loads = split.solve(slots, np.array([[0.5, 0.3, 0.2]]), np.array([0.5, 0.5]))
    assert slot_loads[0] == pytest.approx(np.array([[0.2, 0.3], [0.3, 0.2]]), abs=1e-3)
    assert split.shares(slots, slot_loads, 3)[0] == pytest.approx(
        np.array([[0.4, 1.0], [0.6, 1.0]]), abs=2e-3
    )


@PROPERTY
@given(problems())
def test_no_split_is_better(problem: Problem) -> None:
    profile, topology = problem.profile, problem.topology
    experts = len(profile.banks[0].counts)
    speeds = topology.speeds(experts)
    placement = random_plan(profile, topology).placement
    slots, _ = slot_arrays(placement.banks, topology.capacities(experts))
    loads = normalised([b.counts for b in profile.banks])
    slot_loads = split.solve(slots, loads, speeds, tolerance=1e-9)
    assert (slot_loads >= 0).all()
    for b in range(len(loads)):
        taken = [slot_loads[b][slots[b] == e].sum() for e in range(experts)]
        assert np.array(taken) == pytest.approx(loads[b], abs=1e-6)
        assert slot_loads[b][slots[b] == FREE_SLOT].sum() == 0.0
        peak = utilization(slot_loads, speeds)[b].max()
        assert peak == pytest.approx(least_peak(slots[b], loads[b], speeds), rel=1e-3)


def test_an_expert_without_load_has_shares_too() -> None:
    slots = np.array([[[0, 1], [0, 2], [2, FREE_SLOT]]])
    slot_loads = np.array([[[0.0, 0.5], [0.0, 0.25], [0.25, 0.0]]])
    expected = np.array([[0.5, 1.0], [0.5, 0.5], [0.5, 0.0]])
    assert split.shares(slots, slot_loads, 3)[0] == pytest.approx(expected)


def test_without_second_copies_there_is_nothing_to_solve() -> None:
    slots = np.array([[[0, 1], [2, FREE_SLOT]]])
    slot_loads = split.solve(slots, np.array([[0.2, 0.3, 0.5]]), np.array([0.5, 0.5]))
    assert balancedness(slot_loads, np.array([0.5, 0.5]))[0] == pytest.approx(1.0, abs=1e-5)


def test_banks_are_solved_as_if_alone() -> None:
    generator = np.random.default_rng(0)
    slots = np.array([[[0, 1, 2], [2, 3, 0]], [[0, 1, 3], [2, 1, 3]]])
    loads = normalised(generator.random((2, 4)).tolist())
    speeds = np.array([0.3, 0.7])
    both = split.solve(slots, loads, speeds, tolerance=1e-9)
    for b in range(2):
        alone = split.solve(slots[b : b + 1], loads[b : b + 1], speeds, tolerance=1e-9)
        assert both[b].sum(1) == pytest.approx(alone[0].sum(1), abs=1e-4)
