"""What every plan guarantees, on random loads, devices and current placements."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.placement.random_plan import random_plan
from cluster.core.errors import ConfigError
from cluster.core.load_profile import BankLoad, LoadProfile, device_loads
from cluster.core.placement import FREE_SLOT, ExpertPlacement
from cluster.planner import mesh
from cluster.planner.assess import assess, contiguous_plan
from cluster.planner.base import Floats, PlannedDevice, PlannedTopology, PlanOptions
from cluster.planner.moves import find_moves
from tests.cluster.planner.planner_cases import (
    Problem,
    check_bank,
    domains_of,
    make_profile,
    nodes_of,
    problems,
)

pytestmark = pytest.mark.heavy

PROPERTY = settings(max_examples=25, deadline=None)
BUDGETS = st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0])


def skewed(banks: int, experts: int, seed: int = 0, skew: float = 0.7) -> Floats:
    """Loads of real models are about that unequal."""
    generator = np.random.default_rng(seed)
    return np.asarray(np.exp(skew * generator.normal(size=(banks, experts))))


@PROPERTY
@given(problems())
def test_every_expert_is_placed_within_the_slots_and_once_a_device(problem: Problem) -> None:
    plan = mesh.plan(problem.profile, problem.topology)
    for bank in plan.placement.banks:
        check_bank(bank, problem.topology)


@PROPERTY
@given(problems())
def test_every_expert_is_on_two_nodes_where_slots_allow(problem: Problem) -> None:
    plan = mesh.plan(problem.profile, problem.topology)
    topology = problem.topology
    for bank in plan.placement.banks:
        room: dict[str, int] = {}
        for device in topology.devices:
            slots = min(device.num_expert_slots or 0, bank.num_experts)
            room[device.node] = room.get(device.node, 0) + slots
        if sum(min(n, bank.num_experts) for n in room.values()) >= 2 * bank.num_experts:
            for expert in range(bank.num_experts):
                assert len(nodes_of(bank, expert, topology)) >= 2


@PROPERTY
@given(problems(), BUDGETS)
def test_the_move_budget_is_kept(problem: Problem, fraction: float) -> None:
    topology = problem.topology
    current = random_plan(problem.profile, topology).placement
    options = PlanOptions(max_move_fraction=fraction)
    plan = mesh.plan(problem.later, topology, current, options)
    slots = sum(len(s) for b in current.banks for s in b.physical_to_logical)
    assert len(plan.moves) <= fraction * slots + 1e-9
    changed = [
        (new.layer, d, s, expert)
        for old, new in zip(current.banks, plan.placement.banks, strict=True)
        for d, row in enumerate(new.physical_to_logical)
        for s, expert in enumerate(row)
        if expert not in (FREE_SLOT, *old.physical_to_logical[d][s : s + 1])
    ]
    assert changed == [(m.layer, m.device, m.slot, m.expert) for m in plan.moves]
    for bank in plan.placement.banks:
        check_bank(bank, topology)


@PROPERTY
@given(problems(max_nodes=1), st.sampled_from([None, 0.0, 0.1, 0.5]))
def test_a_plan_is_never_worse_than_what_is_placed(
    problem: Problem, fraction: float | None
) -> None:
    topology = problem.topology
    for current in (
        random_plan(problem.profile, topology).placement,
        mesh.plan(problem.profile, topology).placement,
    ):
        options = PlanOptions(max_move_fraction=fraction)
        plan = mesh.plan(problem.later, topology, current, options)
        before = assess(problem.later, topology, current).balancedness
        after = assess(problem.later, topology, plan.placement).balancedness
        assert all(new >= old - 1e-6 for new, old in zip(after, before, strict=True))
        assert plan.balancedness == pytest.approx(after, abs=1e-5)


@PROPERTY
@given(problems(), st.sampled_from([None, 0.2]))
def test_the_same_input_gives_the_same_plan(problem: Problem, fraction: float | None) -> None:
    current = random_plan(problem.profile, problem.topology).placement
    options = PlanOptions(max_move_fraction=fraction)
    first = mesh.plan(problem.later, problem.topology, current, options)
    again = mesh.plan(problem.later, problem.topology, current, options)
    assert first == again
    assert mesh.plan(problem.later, problem.topology) == mesh.plan(problem.later, problem.topology)


@PROPERTY
@given(problems(), BUDGETS)
def test_no_expert_loses_its_second_node(problem: Problem, fraction: float) -> None:
    topology = problem.topology
    current = mesh.plan(problem.profile, topology).placement
    options = PlanOptions(max_move_fraction=fraction)
    plan = mesh.plan(problem.later, topology, current, options)
    for old, new in zip(current.banks, plan.placement.banks, strict=True):
        on_two = [len(nodes_of(old, e, topology)) >= 2 for e in range(old.num_experts)]
        if all(on_two):
            assert all(len(nodes_of(new, e, topology)) >= 2 for e in range(new.num_experts))


def test_an_unlimited_plan_brings_experts_to_two_nodes() -> None:
    profile = make_profile(skewed(2, 8))
    topology = PlannedTopology.uniform(4, num_redundant=2, num_nodes=2)
    current = contiguous_plan(profile, topology).placement
    assert any(len(nodes_of(current.banks[0], e, topology)) < 2 for e in range(8))
    plan = mesh.plan(profile, topology, current)
    for bank in plan.placement.banks:
        assert all(len(nodes_of(bank, e, topology)) >= 2 for e in range(8))


def test_a_failure_domain_can_be_more_than_a_node() -> None:
    """Four nodes in two racks: copies are in both racks, not merely on two nodes."""
    devices = tuple(
        PlannedDevice(num_expert_slots=8, node=f"node-{d}", domain=f"rack-{d // 2}")
        for d in range(4)
    )
    topology = PlannedTopology(devices=devices)
    plan = mesh.plan(make_profile(skewed(3, 16)), topology)
    for bank in plan.placement.banks:
        assert all(len(domains_of(bank, e, topology)) == 2 for e in range(16))


def test_weights_come_from_the_nearest_device() -> None:
    devices = tuple(
        PlannedDevice(num_expert_slots=2, node=node, link_class=link)
        for node, link in (("a", ""), ("b", "pod"), ("c", "pod"), ("c", "pod"))
    )
    topology = PlannedTopology(devices=devices)
    assert topology.nearness.tolist() == [[2, 0, 0, 0], [0, 2, 1, 1], [0, 1, 2, 2], [0, 1, 2, 2]]
    loads = make_profile(np.ones((1, 2))).banks
    before = np.array([[[0, 1], [0, -1], [-1, -1], [1, -1]]])
    after = np.array([[[0, 1], [0, 1], [0, 1], [1, -1]]])
    moves = find_moves(loads, before, after, topology.nearness)
    assert [(m.device, m.expert, m.source) for m in moves] == [(1, 1, 3), (2, 0, 1), (2, 1, 3)]


@PROPERTY
@given(
    st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(0, 1 << 16),
)
def test_load_is_in_proportion_to_any_speeds_where_slots_allow(
    speeds: list[float], experts: int, seed: int
) -> None:
    devices = tuple(PlannedDevice(num_expert_slots=experts, speed=s) for s in speeds)
    profile = make_profile(skewed(2, experts, seed, 1.5))
    plan = mesh.plan(profile, PlannedTopology(devices=devices))
    for bank, load in zip(plan.placement.banks, profile.banks, strict=True):
        taken = np.array(device_loads(bank, load.counts))
        wanted = np.array(speeds) / sum(speeds)
        assert taken / taken.sum() == pytest.approx(wanted, rel=0.01)


def test_load_is_in_proportion_to_speed() -> None:
    profile = make_profile(skewed(3, 32))
    devices = tuple(PlannedDevice(num_expert_slots=10, speed=s) for s in (1.0, 1.0, 2.0, 4.0))
    plan = mesh.plan(profile, PlannedTopology(devices=devices))
    for bank, load in zip(plan.placement.banks, profile.banks, strict=True):
        taken = [
            sum(share * load.counts[e] for e, share in zip(slots, split, strict=True))
            for slots, split in zip(bank.physical_to_logical, bank.split, strict=True)
        ]
        share = np.array(taken) / sum(taken)
        assert share == pytest.approx(np.array([1, 1, 2, 4]) / 8, rel=0.02)


def test_spare_slots_bring_balance_that_equal_shares_do_not() -> None:
    profile = make_profile(skewed(4, 64), top_k=8)
    plan = mesh.plan(profile, PlannedTopology.uniform(16, num_redundant=1))
    assert min(plan.balancedness) > 0.99
    assert plan.moves == ()


def test_small_changes_of_load_need_no_move() -> None:
    loads = skewed(4, 64)
    topology = PlannedTopology.uniform(8, num_redundant=1)
    current = mesh.plan(make_profile(loads, 8), topology).placement
    changed = loads * np.exp(0.1 * np.random.default_rng(1).normal(size=loads.shape))
    options = PlanOptions(max_move_fraction=0.0)
    plan = mesh.plan(make_profile(changed, 8), topology, current, options)
    assert plan.moves == ()
    assert min(plan.balancedness) > 0.985
    assert plan.placement.epoch == current.epoch + 1


def test_a_move_names_a_device_that_has_the_weights() -> None:
    profile = make_profile(skewed(2, 16, skew=1.5))
    topology = PlannedTopology.uniform(4, num_redundant=1, num_nodes=2)
    current = contiguous_plan(profile, topology).placement
    plan = mesh.plan(profile, topology, current, PlanOptions(max_move_fraction=0.3))
    assert plan.moves
    by_layer = {b.layer: b for b in current.banks}
    for move in plan.moves:
        assert move.expert in by_layer[move.layer].physical_to_logical[move.source]


def test_empty_devices_get_nothing_and_do_not_count() -> None:
    devices = (PlannedDevice(num_expert_slots=0), *[PlannedDevice(num_expert_slots=6)] * 2)
    plan = mesh.plan(make_profile(skewed(1, 8)), PlannedTopology(devices=devices))
    assert plan.placement.banks[0].physical_to_logical[0] == ()
    assert plan.balancedness[0] > 0.99


def test_a_lost_devices_experts_are_placed_again() -> None:
    profile = make_profile(skewed(1, 8))
    apart = PlannedTopology.uniform(3, num_redundant=3, num_nodes=3)  # two copies of every expert
    full = mesh.plan(profile, apart).placement
    alive = full.without_devices(frozenset({1}), epoch=2)
    assert alive is not None
    devices = (
        PlannedDevice(num_expert_slots=6),
        PlannedDevice(num_expert_slots=0),
        PlannedDevice(num_expert_slots=6),
    )
    plan = mesh.plan(profile, PlannedTopology(devices=devices), alive)
    assert all(e == FREE_SLOT for e in plan.placement.banks[0].physical_to_logical[1])
    assert plan.balancedness[0] > 0.97


def test_banks_with_other_numbers_of_experts_are_planned_together() -> None:
    banks = (
        BankLoad(bank="attention", layer=0, counts=(1.0, 2.0, 3.0, 4.0)),
        BankLoad(bank="mlp", layer=0, counts=(5.0, 1.0, 1.0, 1.0, 1.0, 1.0)),
        BankLoad(bank="attention", layer=1, counts=(4.0, 1.0, 1.0, 1.0)),
    )
    profile = LoadProfile(model="test", top_k=2, tokens=10, banks=banks)
    topology = PlannedTopology.uniform(2, num_redundant=1)
    plan = mesh.plan(profile, topology)
    assert [(b.bank, b.layer, b.num_experts) for b in plan.placement.banks] == [
        ("attention", 0, 4),
        ("mlp", 0, 6),
        ("attention", 1, 4),
    ]
    assert assess(profile, topology, plan.placement).balancedness == pytest.approx(
        plan.balancedness, abs=1e-5
    )


def test_experts_that_fire_together_are_placed_together() -> None:
    profile = make_profile(np.ones((1, 16)), top_k=2)
    topology = PlannedTopology.uniform(4)
    couples = np.random.default_rng(0).permutation(16).reshape(8, 2).tolist()
    pairs = np.zeros((16, 16))
    for one, other in couples:
        pairs[one, other] = 1.0

    def together(placement: ExpertPlacement) -> int:
        slots = placement.banks[0].physical_to_logical
        return sum(any(set(couple) <= set(held) for held in slots) for couple in couples)

    plan = mesh.plan(profile, topology, coactivation={("mlp", 0): pairs})
    assert together(plan.placement) >= 7
    assert together(mesh.plan(profile, topology).placement) <= 4
    assert plan.balancedness[0] == pytest.approx(1.0)


def test_a_plan_is_a_placement_file() -> None:
    profile = make_profile(skewed(2, 8))
    topology = PlannedTopology.uniform(2, num_redundant=1)
    current = contiguous_plan(profile, topology).placement
    document = mesh.plan(profile, topology, current).to_dict()
    assert set(document) == {"schema", "epoch", "banks", "predicted", "moves"}
    assert set(document["predicted"]["balancedness"]) == {"mean", "min"}
    assert set(document["predicted"]["decode_slots_over_floor"]) == {"16", "64", "256"}
    assert set(document["moves"][0]) == {"bank", "layer", "device", "slot", "expert", "from"}
    assert ExpertPlacement.from_dict(document).to_dict()["banks"] == document["banks"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": PlannedTopology(devices=(PlannedDevice(num_expert_slots=3),))}, "at least"),
        ({"profile": LoadProfile(model="m", top_k=1, tokens=0, banks=())}, "at least one bank"),
        ({"profile": make_profile(np.ones((3, 8)))}, "layer 2 .* must be there"),
        ({"profile": make_profile(np.ones((2, 9)))}, "must have the 9 experts"),
        ({"profile": make_profile(np.ones((1, 8)))}, "'mlp', 1.* the load profile does not know"),
        ({"topology": PlannedTopology.uniform(4, num_redundant=1)}, "4 devices of the topology"),
        ({"topology": PlannedTopology.uniform(2)}, "device 0 has 4 slots"),
    ],
)
def test_input_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    profile = make_profile(np.ones((2, 8)))
    topology = PlannedTopology.uniform(2, num_redundant=1)
    current = contiguous_plan(profile, topology).placement
    arguments = {"profile": profile, "topology": topology, "current": current, **change}
    with pytest.raises(ConfigError, match=message):
        mesh.plan(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PlanOptions(max_move_fraction=1.5), "max_move_fraction"),
        (lambda: PlanOptions(decode_tokens=0), "decode_tokens"),
        (lambda: PlannedDevice(num_expert_slots=-1), "num_expert_slots"),
        (lambda: PlannedDevice(speed=0.0), "speed"),
        (lambda: PlannedTopology(devices=()), "num_devices"),
        (lambda: PlannedTopology.uniform(2, num_nodes=3), "num_nodes"),
        (lambda: replace(PlannedTopology.uniform(2), num_redundant=-1), "num_redundant"),
    ],
)
def test_wrong_settings_are_refused_by_name(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()
