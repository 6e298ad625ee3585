"""Plans for step groups that have devices of their own."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cluster.config.expert_load import RebalanceSection
from cluster.core.group_placement import is_apart
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Member, StepGroup
from cluster.planner import mesh
from cluster.planner.base import PlannedDevice, PlannedTopology, PlanOptions, planned_topology
from cluster.planner.groups import num_incomplete
from cluster.planner.stages import is_reached, next_stage
from cluster.policy.rebalance import CurrentLoad, decide_placement, mixed_balancedness
from cluster.sizing.replay import ExpertStepCost

GROUPS: tuple[StepGroup, ...] = ("prefill", "prefill", "decode", "decode")
EXPERTS = 16
STEP = ExpertStepCost(slot_s=8e-6, token_s=1e-6, expert_bytes=1000)


def make_profile(seed: int) -> LoadProfile:
    """Zipf-like counts, shuffled for each layer."""
    draw, banks = random.Random(seed), []
    for layer in range(3):
        counts = [1000 / (rank + 1) for rank in range(EXPERTS)]
        draw.shuffle(counts)
        banks.append(BankLoad(bank="mlp", layer=layer, counts=tuple(counts)))
    return LoadProfile(model="m", top_k=2, tokens=1000, banks=tuple(banks))


def make_topology(num_redundant: int = 1) -> PlannedTopology:
    devices = tuple(PlannedDevice(node=f"node-{d}", group=g) for d, g in enumerate(GROUPS))
    return PlannedTopology(devices=devices, num_redundant=num_redundant)


def check_apart(placement: ExpertPlacement) -> None:
    """Each group holds all experts on its own devices, and uses no others."""
    for bank in placement.banks:
        assert is_apart(bank)
        assert set(bank.decode_device) <= {2, 3}
        for own in ((0, 1), (2, 3)):
            held = set().union(*(bank.physical_to_logical[d] for d in own))
            assert held >= set(range(EXPERTS))
        assert not any(share for d in (2, 3) for share in bank.split[d])


def test_each_group_is_planned_on_its_devices() -> None:
    plan = mesh.plan(make_profile(1), make_topology())
    check_apart(plan.placement)
    assert min(plan.balancedness) > 0.9, "of the devices of prompts alone"
    alone = PlannedTopology.uniform(2, 1)
    floor = mesh.plan(make_profile(1), alone).decode_slots_over_floor
    assert plan.decode_slots_over_floor[64] == pytest.approx(floor[64], abs=0.02)


def test_a_new_load_moves_experts_within_their_groups() -> None:
    first = mesh.plan(make_profile(1), make_topology()).placement
    options = PlanOptions(max_move_fraction=0.2)
    plan = mesh.plan(make_profile(2), make_topology(), first, options)
    check_apart(plan.placement)
    assert 0 < plan.move_fraction <= 0.2
    before = mesh.plan(make_profile(2), make_topology(), first, PlanOptions(max_move_fraction=0))
    assert sum(plan.balancedness) > sum(before.balancedness)


@pytest.mark.parametrize("prefill_share", [0.1, 0.9])
def test_rebalancing_keeps_the_groups_apart(prefill_share: float) -> None:
    first = mesh.plan(make_profile(1), make_topology()).placement
    load = CurrentLoad(profile=make_profile(3), prefill_share=prefill_share)
    section = RebalanceSection(max_move_fraction=0.3)
    topology = planned_topology(
        [
            Member(name=str(d), role="expert", rank=d, device=d, group=g)
            for d, g in enumerate(GROUPS)
        ],
        first,
        9,
    )
    decision = decide_placement(load, topology, first, section, STEP)
    assert decision.action != "none"
    assert decision.time_ratio < 1
    check_apart(decision.target)
    assert (mixed_balancedness(decision.target, load) or 0) > (mixed_balancedness(first, load) or 1)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5])
def test_stages_keep_all_experts_in_each_group(seed: int) -> None:
    """Slots change in several stages; none takes the last copy of a group."""
    first = mesh.plan(make_profile(seed), make_topology()).placement
    topology = with_slots(9)
    options = PlanOptions(max_move_fraction=0.5)
    target = mesh.plan(make_profile(seed + 100), topology, first, options).placement
    now, stages = first, 0
    while (stage := next_stage(now, target, 9, frozenset(range(4)), topology.groups)) is not None:
        now = mesh.resolved(make_profile(seed + 100), topology, stage.placement)
        check_apart(now)
        stages += 1
        assert stages < 20
    assert is_reached(now, target)
    assert stages > 1


def test_a_group_gets_back_the_experts_that_it_lacks() -> None:
    """As after rebalancing without one of its devices. It takes precedence over any gain."""
    shared = mesh.plan(make_profile(1), make_topology().shared()).placement
    topology = with_slots(9)
    assert num_incomplete(topology, shared) == 6
    load = CurrentLoad(profile=make_profile(1), prefill_share=0.5)
    decision = decide_placement(load, topology, shared, RebalanceSection(), STEP)
    assert decision.reason == "each step group gets all experts on its own devices"
    check_apart(decision.target)


def test_the_larger_group_has_fewer_slots_each() -> None:
    groups: tuple[StepGroup, ...] = ("prefill", "decode", "decode", "decode")
    devices = tuple(PlannedDevice(node=f"node-{d}", group=g) for d, g in enumerate(groups))
    topology = PlannedTopology(devices=devices, num_redundant=1)
    first = mesh.plan(make_profile(1), topology).placement
    members = [
        Member(name=str(d), role="expert", rank=d, device=d, group=g) for d, g in enumerate(groups)
    ]
    found = planned_topology(members, first, 17)
    assert [device.num_expert_slots for device in found.devices] == [17, 7, 7, 7]


def test_the_groups_share_what_is_left_if_one_has_too_few_slots() -> None:
    first = mesh.plan(make_profile(1), make_topology()).placement
    members = [
        Member(name=str(d), role="expert", rank=d, device=d, group=g)
        for d, g in enumerate(GROUPS)
        if d != 2
    ]
    topology = planned_topology(members, first, 9)
    assert topology.groups is None
    left = first.without_devices(frozenset({2}), 2)
    assert left is not None
    plan = mesh.plan(make_profile(1), topology, left, PlanOptions(max_move_fraction=0.1))
    assert not plan.placement.banks[0].physical_to_logical[2:3][0]
    whole = planned_topology([*members, replace_group(members[0])], first, 9)
    assert whole.groups is not None


def replace_group(member: Member) -> Member:
    """The lost worker's replacement."""
    return Member(name=f"{member.name}.2", role="expert", rank=2, device=2, group="decode")


def with_slots(num_slots: int) -> PlannedTopology:
    """Devices with as many slots each, as those of a running cluster."""
    devices = (replace(device, num_expert_slots=num_slots) for device in make_topology().devices)
    return PlannedTopology(devices=tuple(devices))
