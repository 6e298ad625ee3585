"""Which device serves which expert when members leave and join."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from benchmarks.harness.members import members_of
from cluster.core.errors import ConflictError
from cluster.core.placement import (
    FREE_SLOT,
    BankPlacement,
    BankShape,
    ExpertPlacement,
    contiguous,
)
from cluster.core.topology import Generation, Member
from cluster.planner.stages import SlotFill, Stage
from cluster.policy.coverage import (
    ExpertHoldings,
    FailureDecision,
    Missing,
    decide_members,
    describe_losses,
    describe_pools,
    plan_coverage,
    stage_on,
)
from tests.cluster.controller.fakes_cluster import BANKS, make_members

REDUNDANT = contiguous(BANKS, 3, num_redundant=3, epoch=7)


def one_bank(*maps: tuple[int, ...], num_experts: int = 4) -> ExpertPlacement:
    bank = BankPlacement.from_maps(
        bank="mlp", layer=0, num_experts=num_experts, physical_to_logical=maps
    )
    return ExpertPlacement(epoch=1, banks=(bank,))


def covered(holdings: ExpertHoldings, devices: Collection[int], epoch: int) -> Stage:
    stage, missing = plan_coverage(holdings, devices, epoch)
    assert stage is not None
    assert not missing
    return stage


def missing_on(holdings: ExpertHoldings, devices: Collection[int]) -> Missing:
    stage, missing = plan_coverage(holdings, devices, 2)
    assert stage is None
    return missing


def maps_of(stage: Stage) -> tuple[tuple[int, ...], ...]:
    return stage.placement.banks[0].physical_to_logical


def stage_of(decision: FailureDecision) -> Stage:
    assert decision.stage is not None
    return decision.stage


def test_the_example_of_the_module() -> None:
    desired = one_bank((0, 1), (2, 3), (0, 2))
    lost = covered(ExpertHoldings(current=desired, desired=desired), {0, 2}, 2)
    assert maps_of(lost) == ((0, 1, 3), (-1, -1), (0, 2))
    assert lost.fills == (SlotFill(device=0, bank=0, slot=2, expert=3),)
    assert lost.placement.epoch == 2
    back = ExpertHoldings(current=lost.placement, desired=desired, joining={1: desired})
    assert covered(back, {0, 1, 2}, 3).placement == structs.replace(desired, epoch=3)


def test_copies_that_are_left_serve_without_a_load() -> None:
    desired = contiguous(BANKS, 3, num_redundant=3)
    found = covered(ExpertHoldings(current=desired, desired=desired), {0, 2}, 2)
    assert found.fills == ()
    for bank in found.placement.banks:
        assert bank.physical_to_logical[1] == (FREE_SLOT,) * 6
        assert set(bank.decode_device) == {0, 2}


def test_lost_experts_are_spread_by_their_load() -> None:
    desired = one_bank((0, 1, 2, 3, 4, 5), (6,), (7,), num_experts=8)
    load = {("mlp", 0): [50, 10, 10, 10, 10, 10, 0, 0]}
    found = covered(ExpertHoldings(current=desired, desired=desired, expert_load=load), {1, 2}, 2)
    assert maps_of(found) == ((FREE_SLOT,) * 6, (6, 0), (7, 1, 2, 3, 4, 5))
    even = covered(ExpertHoldings(current=desired, desired=desired), {1, 2}, 2)
    assert [len(row) for row in maps_of(even)[1:]] == [4, 4]


def test_a_shared_expert_is_a_part_of_the_work() -> None:
    """Device 0 has half of experts 0 and 1, device 1 all of expert 2, which weighs more."""
    desired = one_bank((0, 1, FREE_SLOT), (2, FREE_SLOT), (0, 1), (3,))
    load = {("mlp", 0): [10, 10, 14, 2]}
    found = covered(
        ExpertHoldings(current=desired, desired=desired, expert_load=load), {0, 1, 2}, 2
    )
    assert maps_of(found) == ((0, 1, 3), (2, FREE_SLOT), (0, 1), (FREE_SLOT,))


def test_free_slots_are_no_work() -> None:
    desired = one_bank((FREE_SLOT, 0), (1,), (2,), num_experts=3)
    load = {("mlp", 0): [1, 2, 9]}
    found = covered(ExpertHoldings(current=desired, desired=desired, expert_load=load), {0, 1}, 2)
    assert maps_of(found)[:2] == ((2, 0), (1,))


def test_experts_that_lose_their_decode_device_are_divided_evenly() -> None:
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=4,
        physical_to_logical=((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)),
        decode_device=(2, 2, 1, 2),
    )
    desired = ExpertPlacement(epoch=1, banks=(bank,))
    found = covered(ExpertHoldings(current=desired, desired=desired), {0, 1}, 2).placement
    assert found.banks[0].decode_device == (0, 1, 1, 0)


def test_copies_that_were_never_desired_share_equally() -> None:
    desired = one_bank((0, 1), (2, 3), (0, 2))
    current = one_bank((0, 1, 3), (FREE_SLOT, FREE_SLOT), (0, 2, 3))
    joining = {1: one_bank((0, 1, 3), (2, FREE_SLOT), (0, 2, 3))}
    holdings = ExpertHoldings(current=current, desired=desired, joining=joining)
    found = covered(holdings, {0, 1, 2}, 2).placement
    assert found.banks[0].physical_to_logical == ((0, 1, 3), (2, FREE_SLOT), (0, 2, 3))
    assert found.banks[0].split == ((0.5, 1.0, 0.5), (0.5, 0.0), (0.5, 0.5, 0.5))


def test_a_failed_load_into_a_slot_that_the_new_worker_lacks_changes_nothing() -> None:
    desired = one_bank((0, 1), (2, 3))
    current = one_bank((0, 1), (2, 3, 0))
    failed = [SlotFill(device=1, bank=0, slot=2, expert=0)]
    holdings = ExpertHoldings(current=current, desired=desired, joining={1: desired}, failed=failed)
    assert maps_of(covered(holdings, {0, 1}, 2)) == ((0, 1), (2, 3))


def test_a_stage_names_what_the_others_must_load_and_from_whom() -> None:
    current = one_bank((0, 1), (2, 3))
    stage = stage_on({0}, current, room=None)
    assert stage.placement.epoch == 2
    assert stage.placement.banks[0].physical_to_logical == ((0, 1, 2, 3), (-1, -1))
    assert [(load.slot, load.expert, load.sources) for load in stage.fills] == [
        (2, 2, (1,)),
        (3, 3, (1,)),
    ]
    with pytest.raises(ConflictError, match="no free slots for 1 experts that only they hold"):
        stage_on({0}, current, room=3)


def test_without_room_the_missing_experts_are_named() -> None:
    desired = one_bank((0, 1), (2, 3))
    holdings = ExpertHoldings(current=desired, desired=desired, room=3)
    assert missing_on(holdings, {0}) == [(0, 3)]
    assert covered(replace(holdings, room=4), {0}, 2).fills
    assert missing_on(replace(holdings, room=2), {0}) == [(0, 2), (0, 3)]
    assert missing_on(holdings, ()) == [(0, e) for e in range(4)]


def test_free_slots_are_used_first() -> None:
    desired = one_bank((0, FREE_SLOT, 1), (2, 3))
    found = covered(ExpertHoldings(current=desired, desired=desired, room=4), {0}, 2)
    assert maps_of(found)[0] == (0, 2, 1, 3)


def test_a_device_that_cannot_load_is_left_out() -> None:
    desired = one_bank((0, 1), (2, 3), (0, 1))
    first = covered(ExpertHoldings(current=desired, desired=desired), {0, 2}, 2)
    assert {load.device for load in first.fills} == {0, 2}
    failed = [load for load in first.fills if load.device == 0]
    again = ExpertHoldings(
        current=first.placement, desired=desired, barred=frozenset({0}), failed=failed
    )
    second = covered(again, {0, 2}, 3)
    assert [load.device for load in second.fills] == [2]
    assert sorted(maps_of(second)[2]) == [0, 1, 2, 3]
    assert maps_of(second)[0] == (0, 1)
    both = replace(again, barred=frozenset({0, 2}))
    assert missing_on(both, {0, 2}) == [(0, failed[0].expert)]


def test_what_was_loaded_stays_until_a_desired_copy_is_back() -> None:
    desired = one_bank((0, 1), (2, 3), (4, 5), num_experts=6)
    lost = covered(ExpertHoldings(current=desired, desired=desired), {0}, 2)
    assert maps_of(lost)[0] == (0, 1, 2, 3, 4, 5)
    first = ExpertHoldings(current=lost.placement, desired=desired, joining={2: desired})
    one = covered(first, {0, 2}, 3)
    assert maps_of(one) == ((0, 1, 2, 3), (-1, -1), (4, 5))
    assert one.fills == ()
    both = ExpertHoldings(current=one.placement, desired=desired, joining={1: desired})
    assert covered(both, {0, 1, 2}, 4).placement == structs.replace(desired, epoch=4)


def test_shares_and_decode_devices_come_back_with_the_copies() -> None:
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=2,
        physical_to_logical=((0, 1), (1, 0)),
        split=((0.25, 0.5), (0.5, 0.75)),
        decode_device=(1, 0),
    )
    desired = ExpertPlacement(epoch=1, banks=(bank,))
    lost = covered(ExpertHoldings(current=desired, desired=desired), {0}, 2).placement
    assert lost.banks[0].split == ((1.0, 1.0), (0.0, 0.0))
    assert lost.banks[0].decode_device == (0, 0)
    back = covered(ExpertHoldings(current=lost, desired=desired, joining={1: desired}), {0, 1}, 3)
    assert back.placement == ExpertPlacement(epoch=3, banks=(bank,))


@pytest.mark.parametrize("seed", range(40))
def test_any_coming_and_going_keeps_every_expert_somewhere(seed: int) -> None:
    """What a step names is in memory: kept from before, joined with, or loaded by this order."""
    draw = random.Random(seed)
    num_devices = draw.randint(1, 5)
    shapes = [BankShape(bank="mlp", layer=i, num_experts=draw.randint(5, 12)) for i in range(2)]
    desired = contiguous(shapes, num_devices, draw.randint(0, 2))
    current, present = desired, set(range(num_devices))
    for epoch in range(2, 30):
        joining: dict[int, ExpertPlacement] = {}
        if draw.random() < 0.5 and len(present) > 1:
            present.discard(draw.choice(sorted(present)))
        elif absent := sorted(set(range(num_devices)) - present):
            joining[draw.choice(absent)] = desired
            present |= set(joining)
        holdings = ExpertHoldings(current=current, desired=desired, joining=joining)
        found = covered(holdings, present, epoch)
        loads = {(load.device, load.bank, load.slot): load.expert for load in found.fills}
        for b, bank in enumerate(found.placement.banks):
            for device, row in enumerate(bank.physical_to_logical):
                held = (joining.get(device) or current).banks[b].physical_to_logical[device]
                for slot, expert in enumerate(row):
                    if expert == FREE_SLOT:
                        continue
                    assert device in present
                    before = held[slot] if slot < len(held) else FREE_SLOT
                    assert loads.pop((device, b, slot), before) == expert
        assert loads == {}
        if present == set(range(num_devices)):
            assert found.placement == structs.replace(desired, epoch=epoch)
        current = found.placement


def without(
    members: tuple[Member, ...],
    placement: ExpertPlacement,
    *lost: str,
    highest_epoch: int = 1,
    **holdings: Any,
) -> FailureDecision:
    """The decision for the workers that are left."""
    survivors = [m for m in members if m.name not in lost]
    held = ExpertHoldings(current=placement, desired=placement, **holdings)
    return decide_members(survivors, held, highest_epoch)


def test_experts_with_copies_elsewhere_go_on_in_a_new_epoch() -> None:
    decision = without(make_members(1, 3), REDUNDANT, "expert-1", highest_epoch=7)
    assert stage_of(decision).fills == ()
    assert stage_of(decision).placement.epoch == 8
    assert stage_of(decision).placement.banks[0].physical_to_logical[1] == (-1,) * 6
    assert decision.effect == "continue with 1 attention and 2 expert workers, placement epoch 8"


def test_a_colocated_worker_takes_its_experts_and_its_rank_along() -> None:
    members = members_of({"colocated": 3})
    decision = without(members, REDUNDANT, "colocated-0")
    left = Generation(number=2, members=members[1:])
    assert [m.rank for m in left.attention] == [m.rank for m in left.experts] == [1, 2]
    assert left.leader.name == "colocated-1"
    assert stage_of(decision).placement.banks[0].physical_to_logical[0] == (-1,) * 6
    assert decision.effect == "continue with 2 colocated workers, placement epoch 8"


def test_the_epoch_is_above_all_that_any_survivor_ran() -> None:
    decision = without(make_members(1, 3), REDUNDANT, "expert-1", highest_epoch=11)
    assert stage_of(decision).placement.epoch == 12


def test_experts_without_copy_are_loaded_by_the_others() -> None:
    decision = without(make_members(1, 3), contiguous(BANKS, 3), "expert-0")
    assert decision.experts_complete
    assert sorted({load.device for load in stage_of(decision).fills}) == [1, 2]
    assert len(stage_of(decision).fills) == 6
    assert decision.effect == (
        "expert-1, expert-2 load 6 experts; "
        "continue with 1 attention and 2 expert workers, placement epoch 2"
    )


def test_the_last_colocated_worker_goes_on_alone() -> None:
    decision = without(members_of({"colocated": 2}), contiguous(BANKS, 2), "colocated-0")
    assert decision.effect == (
        "colocated-1 loads 8 experts; continue with 1 colocated worker, placement epoch 2"
    )


def test_an_expert_without_copy_and_without_room_is_named() -> None:
    placement = contiguous(BANKS, 3)
    decision = without(make_members(1, 3), placement, "expert-0", room=3)
    assert decision.stage is None
    assert not decision.experts_complete
    assert decision.effect == (
        "4 experts have no copy left, the first is expert 1 of bank mlp layer 0"
    )


def test_one_expert_without_copy_is_named_alone() -> None:
    placement = contiguous(BANKS[:1], 2)
    decision = without(make_members(1, 2), placement, "expert-0", room=7)
    assert decision.effect == "1 expert has no copy left, the first is expert 3 of bank mlp layer 0"


def test_a_lost_attention_worker_leaves_the_maps_alone() -> None:
    placement = contiguous(BANKS, 3)
    decision = without(make_members(2, 3), placement, "attention-0")
    assert stage_of(decision).placement == placement


def test_without_attention_worker_nothing_runs() -> None:
    decision = without(make_members(1, 3), contiguous(BANKS, 3), "attention-0")
    assert decision.stage is None
    assert decision.experts_complete
    assert decision.effect == "no attention worker is left"


def test_without_attention_worker_nothing_is_loaded() -> None:
    placement = contiguous(BANKS, 3)
    decision = without(make_members(1, 3), placement, "attention-0", "expert-0")
    assert decision.stage is None
    assert not decision.experts_complete


def test_a_worker_that_holds_everything_brings_all_experts_with_it() -> None:
    placement = contiguous(BANKS, 1)
    members = make_members(1, 0)
    decision = without(members, placement, is_local=True)
    assert stage_of(decision).fills == ()
    assert stage_of(decision).placement == placement
    lost = without(members, placement, "attention-0", is_local=True)
    assert lost.effect == "no attention worker is left"
    assert not lost.experts_complete


def test_two_workers_lost_at_once_are_both_in_the_cause() -> None:
    assert describe_losses({"expert-2": "closed", "expert-0": "closed"}) == (
        "lost expert-0: closed; lost expert-2: closed"
    )
    decision = without(make_members(1, 3), REDUNDANT, "expert-2", "expert-0", highest_epoch=7)
    assert decision.effect.endswith(
        "continue with 1 attention and 1 expert worker, placement epoch 8"
    )


def test_a_new_worker_brings_its_copies_back() -> None:
    less = stage_of(without(make_members(1, 3), REDUNDANT, "expert-1", highest_epoch=7)).placement
    holdings = ExpertHoldings(current=less, desired=REDUNDANT, joining={1: REDUNDANT})
    decision = decide_members(make_members(1, 3), holdings, 8)
    assert stage_of(decision).placement == structs.replace(REDUNDANT, epoch=9)
    assert stage_of(decision).fills == ()


def test_a_pool_without_workers_is_named_too() -> None:
    assert describe_pools({"attention": 1}) == "1 attention and 0 expert workers"
    assert describe_pools({"expert": 1}) == "0 attention and 1 expert worker"
    assert describe_pools({"colocated": 1}) == "1 colocated worker"


def test_decodes_stay_with_devices_that_decode() -> None:
    """Device 2 is lost; device 3 decodes too and holds all experts, as devices of prompts do."""
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=4,
        physical_to_logical=[(0, 1, 2, 3)] * 4,
        split=[(0.5,) * 4, (0.5,) * 4, (0.0,) * 4, (0.0,) * 4],
        decode_device=(2, 3, 2, 3),
    )
    placement = ExpertPlacement(epoch=1, banks=(bank,))
    stage = covered(ExpertHoldings(current=placement, desired=placement), {0, 1, 3}, 2)
    assert stage.placement.banks[0].decode_device == (3, 3, 3, 3)
    left = placement.without_devices(frozenset({2}), 2)
    assert left is not None
    assert left.banks[0].decode_device == (3, 3, 3, 3)
