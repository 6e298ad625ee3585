"""The public algorithm, by its published example, and the plans that look at no load."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.placement.random_plan import random_plan, siblings
from cluster.core.errors import ConfigError
from cluster.core.load_profile import LoadProfile
from cluster.core.placement import FREE_SLOT
from cluster.planner import eplb, mesh
from cluster.planner.assess import contiguous_plan
from cluster.planner.base import Plan, PlannedDevice, PlannedTopology
from tests.cluster.planner.planner_cases import Problem, check_bank, make_profile, problems

PROPERTY = settings(max_examples=25, deadline=None)
PUBLISHED_LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
PUBLISHED_RESULT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example_comes_out() -> None:
    found = eplb.rebalance(PUBLISHED_LOADS, num_slots=16, num_devices=8, num_groups=4, num_nodes=2)
    assert found.tolist() == PUBLISHED_RESULT


def test_groups_that_nodes_do_not_divide_are_balanced_globally() -> None:
    alone = eplb.rebalance(PUBLISHED_LOADS, num_slots=16, num_devices=8)
    groups = eplb.rebalance(PUBLISHED_LOADS, num_slots=16, num_devices=8, num_groups=3, num_nodes=2)
    assert groups.tolist() == alone.tolist()
    assert alone.tolist() != PUBLISHED_RESULT


def test_two_copies_on_a_device_become_one_with_both_shares() -> None:
    bank = eplb.equally_shared("mlp", 0, 3, [[0, 0], [1, 2], [0, 1]])
    assert bank.physical_to_logical == ((0, FREE_SLOT), (1, 2), (0, 1))
    assert np.array(bank.split) == pytest.approx(np.array([[2 / 3, 0], [0.5, 1], [1 / 3, 0.5]]))
    assert siblings([[0, 0], [1, 2], [0, 1], [2, 2, 2]]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slots": 16, "num_devices": 8, "num_groups": 5, "num_nodes": 5}, "num_groups"),
        ({"num_slots": 16, "num_devices": 8, "num_groups": 3, "num_nodes": 3}, "num_nodes"),
        ({"num_slots": 15, "num_devices": 8}, "multiple of devices"),
        ({"num_slots": 8, "num_devices": 8}, "at least 12"),
    ],
)
def test_counts_that_do_not_divide_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        eplb.rebalance(PUBLISHED_LOADS, **arguments)


def test_devices_that_differ_are_refused() -> None:
    topology = PlannedTopology(
        devices=(PlannedDevice(num_expert_slots=8), PlannedDevice(num_expert_slots=4))
    )
    with pytest.raises(ConfigError, match="must be equal for eplb"):
        eplb.plan(make_profile(PUBLISHED_LOADS), topology)
    with pytest.raises(ConfigError, match="contiguous"):
        contiguous_plan(make_profile(PUBLISHED_LOADS), topology)


def test_it_replans_whatever_is_placed() -> None:
    topology = PlannedTopology.uniform(4, num_redundant=1)
    profile = make_profile(PUBLISHED_LOADS)
    first = eplb.plan(profile, topology)
    again = eplb.plan(profile, topology, first.placement)
    assert first.moves == again.moves == ()
    assert again.placement.epoch == 2
    other = eplb.plan(make_profile(PUBLISHED_LOADS[::-1]), topology, first.placement)
    assert other.move_fraction > 0.5


@pytest.mark.parametrize("plan", [mesh.plan, eplb.plan, contiguous_plan])
def test_a_load_without_banks_is_refused(
    plan: Callable[[LoadProfile, PlannedTopology], Plan],
) -> None:
    nothing = LoadProfile(model="dense", top_k=1, tokens=0, banks=())
    with pytest.raises(ConfigError, match="must name at least one bank"):
        plan(nothing, PlannedTopology.uniform(2))


@PROPERTY
@given(problems())
def test_random_plans_keep_the_rules(problem: Problem) -> None:
    plan = random_plan(problem.profile, problem.topology, seed=3)
    for bank in plan.placement.banks:
        check_bank(bank, problem.topology)
    assert plan == random_plan(problem.profile, problem.topology, seed=3)
