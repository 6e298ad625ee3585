"""From one placement to another in stages, without ever losing an expert or a slot in force."""

from __future__ import annotations

import random

import pytest

from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.planner.stages import held_by, is_reached, next_stage

MAX_STAGES = 200


def placement(*rows: list[int], num_experts: int = 4, banks: int = 1) -> ExpertPlacement:
    maps = [
        BankPlacement.from_maps(
            bank="mlp", layer=i, num_experts=num_experts, physical_to_logical=rows
        )
        for i in range(banks)
    ]
    return ExpertPlacement(epoch=3, banks=tuple(maps))


def random_placement(rng: random.Random, experts: int, devices: int, slots: int) -> ExpertPlacement:
    """Every expert somewhere, the rest at random."""
    while True:
        rows: list[list[int]] = [[] for _ in range(devices)]
        for expert in rng.sample(range(experts), experts):
            open_rows = [r for r in rows if len(r) < slots]
            rng.choice(open_rows).append(expert)
        for row in rows:
            rest = [e for e in range(experts) if e not in row]
            rng.shuffle(rest)
            while len(row) < slots and rest and rng.random() < 0.9:
                row.append(rest.pop())
        return placement(*rows, num_experts=experts)


def walk(
    current: ExpertPlacement,
    target: ExpertPlacement,
    num_slots: int,
    devices: frozenset[int],
    num_copies: list[list[int]] | None = None,
) -> list[ExpertPlacement]:
    """All stages, each checked against the one before, and with at least so many copies."""
    found = [current]
    while (stage := next_stage(found[-1], target, num_slots, devices)) is not None:
        before = found[-1]
        for fill in stage.fills:
            row = before.banks[fill.bank].physical_to_logical[fill.device]
            assert fill.slot >= len(row) or row[fill.slot] == FREE_SLOT
            assert fill.slot < num_slots
            assert fill.device in devices
            assert fill.sources
            for source in fill.sources:
                assert fill.expert in before.banks[fill.bank].physical_to_logical[source]
        for old, new in zip(before.banks, stage.placement.banks, strict=True):
            filled = {(f.device, f.slot): f.expert for f in stage.fills}
            for device, row in enumerate(new.physical_to_logical):
                for slot, expert in enumerate(row):
                    was = old.physical_to_logical[device]
                    kept = slot < len(was) and was[slot] == expert
                    assert kept or expert in (FREE_SLOT, filled.get((device, slot)))
        assert stage.placement.epoch == before.epoch + 1
        if num_copies is not None:
            for new, least in zip(stage.placement.banks, num_copies, strict=True):
                assert all(a >= b for a, b in zip(new.replica_count, least, strict=True))
        found.append(stage.placement)
        assert len(found) < MAX_STAGES
    return found


def test_the_example() -> None:
    now = placement([0, 1, 2], [2, 3, 0])
    target = placement([0, 1, 3], [2, 3, 1])
    stages = walk(now, target, 3, frozenset({0, 1}))
    rows = [s.banks[0].physical_to_logical for s in stages]
    assert rows == [
        ((0, 1, 2), (2, 3, 0)),
        ((0, 1, -1), (2, 3, -1)),
        ((0, 1, 3), (2, 3, 1)),
    ]


def test_with_a_free_slot_an_expert_moves_before_its_copy_goes() -> None:
    now = placement([0, 1], [2, 3])
    target = placement([0, 2], [1, 3])
    stages = walk(now, target, 3, frozenset({0, 1}))
    assert is_reached(stages[-1], target)
    assert stages[1].banks[0].physical_to_logical == ((0, FREE_SLOT, 2), (FREE_SLOT, 3, 1))


def test_only_copies_that_change_places_need_a_spare_slot() -> None:
    now, target = placement([0, 1], [2, 3]), placement([0, 2], [1, 3])
    assert next_stage(now, target, 2, frozenset({0, 1})) is None


def test_a_copy_that_stays_makes_room_for_a_moment() -> None:
    now = placement([0, 1, 2], [2, 3, 0])
    target = placement([0, 3, 2], [2, 1, 0])
    stages = walk(now, target, 3, frozenset({0, 1}))
    assert is_reached(stages[-1], target)
    assert len(stages) > 3


def test_the_target_itself_needs_nothing() -> None:
    now = placement([0, 1, 2], [2, 3, 0])
    assert next_stage(now, placement([2, 0, 1], [0, 2, 3]), 3, frozenset({0, 1})) is None


def test_a_lost_device_gets_nothing() -> None:
    now = placement([0, 1, 2, 3], [FREE_SLOT] * 4, [0, 1])
    target = placement([0, 1, 2], [3], [0, 1, 3])
    stages = walk(now, target, 4, frozenset({0, 2}))
    last = stages[-1].banks[0]
    assert held_by(last, 1) == frozenset()
    assert held_by(last, 2) == {0, 1, 3}
    assert held_by(last, 0) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(150))
def test_any_target_is_reached_in_stages_that_all_work(seed: int) -> None:
    """A spare slot on each device beyond what is placed is always enough."""
    rng = random.Random(seed)
    devices = rng.randint(2, 5)
    experts = rng.randint(devices, 14)
    slots = -(-experts // devices) + rng.randint(0, 2)
    now = random_placement(rng, experts, devices, slots)
    target = random_placement(rng, experts, devices, slots)
    pairs = zip(now.banks, target.banks, strict=True)
    least = [list(map(min, a.replica_count, b.replica_count)) for a, b in pairs]
    stages = walk(now, target, slots + 1, frozenset(range(devices)), least)
    assert is_reached(stages[-1], target)


@pytest.mark.parametrize("seed", range(150))
def test_without_a_free_slot_it_goes_as_far_as_it_can(seed: int) -> None:
    rng = random.Random(1000 + seed)
    devices = rng.randint(2, 4)
    experts = rng.randint(devices, 12)
    slots = -(-experts // devices) + 1
    now = random_placement(rng, experts, devices, slots)
    target = random_placement(rng, experts, devices, slots)
    walk(now, target, slots, frozenset(range(devices)))  # ends, and every stage is consistent


def test_shares_follow_the_copies_that_stay() -> None:
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=2,
        physical_to_logical=[[0, 1], [0, -1], [0, -1]],
        split=[[0.5, 1.0], [0.3, 0.0], [0.2, 0.0]],
        decode_device=[1, 0],
    )
    fewer = bank.with_slots([[0, 1], [-1, -1], [0, 1]])
    assert fewer.split == ((0.5 / 0.7, 1.0), (0.0, 0.0), (0.2 / 0.7, 0.0))
    assert fewer.decode_device == (0, 0)
