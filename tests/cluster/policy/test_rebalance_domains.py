"""Rebalancing gives each expert copies in two failure domains, whatever the load gains by it."""

from __future__ import annotations

import random

import pytest
from msgspec import structs

from cluster.config.expert_load import RebalanceSection
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import BankShape, ExpertPlacement, contiguous
from cluster.core.topology import Member
from cluster.planner.base import planned_topology
from cluster.planner.mesh import num_at_risk
from cluster.policy.rebalance import CurrentLoad, RebalanceDecision, decide_placement
from cluster.sizing.replay import ExpertStepCost
from tests.cluster.controller.fakes_cluster import make_members

pytestmark = pytest.mark.heavy

EXPERTS = 8
DEVICES = 4
SHAPES = tuple(BankShape(bank="mlp", layer=i, num_experts=EXPERTS) for i in range(2))
STEP = ExpertStepCost(slot_s=8e-6, token_s=1e-6, expert_bytes=1000)
ENOUGH = 4
"""Expert slots of a device, with which each expert has two copies."""


def members(*racks: str) -> list[Member]:
    workers = make_members(1, len(racks))[1:]
    return [
        structs.replace(m, node=f"n{m.device}", domain=rack)
        for m, rack in zip(workers, racks, strict=True)
    ]


NEIGHBOURS = members("a", "a", "b", "b")
"""Copies of ``contiguous`` are on neighbouring devices, so half of the experts are in one rack."""


def load(rng: random.Random | None = None) -> CurrentLoad:
    banks = tuple(
        BankLoad(
            bank="mlp",
            layer=shape.layer,
            counts=tuple(rng.uniform(0, 100) if rng else 50.0 for _ in range(EXPERTS)),
        )
        for shape in SHAPES
    )
    profile = LoadProfile(model="demo", top_k=2, tokens=1000, banks=banks)
    return CurrentLoad(profile=profile, prefill_share=0.5)


def decided(
    some: CurrentLoad,
    workers: list[Member],
    now: ExpertPlacement,
    max_move_fraction: float = 1.0,
    num_slots: int = ENOUGH,
) -> RebalanceDecision:
    section = RebalanceSection(max_move_fraction=max_move_fraction)
    return decide_placement(some, planned_topology(workers, now, num_slots), now, section, STEP)


def at_risk(workers: list[Member], placement: ExpertPlacement, num_slots: int = ENOUGH) -> int:
    topology = planned_topology(workers, placement, num_slots)
    return num_at_risk(load().profile, topology, placement)


def test_experts_at_risk_are_spread_although_an_even_load_gains_nothing() -> None:
    now = contiguous(SHAPES, DEVICES, num_redundant=2)
    assert at_risk(NEIGHBOURS, now) == 8
    decision = decided(load(), NEIGHBOURS, now)
    assert decision.reason == "8 experts get a copy in a second failure domain"
    assert (decision.action, at_risk(NEIGHBOURS, decision.target)) == ("move", 0)
    assert decided(load(), NEIGHBOURS, decision.target).action == "none"


def test_a_small_limit_of_moves_spreads_some_experts_each_time() -> None:
    now, counts = contiguous(SHAPES, DEVICES, num_redundant=2), [8]
    while counts[-1]:
        decision = decided(load(), NEIGHBOURS, now, max_move_fraction=0.1)
        now = decision.target
        counts.append(at_risk(NEIGHBOURS, now))
        assert decision.num_moves <= 3
        assert counts[-1] < counts[-2]


def test_a_worker_that_returned_in_another_rack_is_a_reason_to_move_experts() -> None:
    apart = members("a", "b", "a", "b")
    placed = decided(load(), apart, contiguous(SHAPES, DEVICES, num_redundant=2)).target
    assert at_risk(apart, placed) == 0
    moved = members("a", "b", "a", "a")
    assert at_risk(moved, placed) == 0, "one device cannot hold a copy of each expert"
    wide = decided(load(), moved, placed, num_slots=EXPERTS)
    assert at_risk(moved, wide.target, EXPERTS) == 0 < at_risk(moved, placed, EXPERTS)


@pytest.mark.parametrize(
    ("workers", "num_slots"),
    [(members("a", "a", "a", "a"), ENOUGH), (NEIGHBOURS, ENOUGH - 1)],
    ids=["one domain", "too few slots"],
)
def test_without_a_second_domain_or_slots_an_even_load_is_left_alone(
    workers: list[Member], num_slots: int
) -> None:
    now = contiguous(SHAPES, DEVICES, num_redundant=num_slots - 2)
    assert at_risk(workers, now, num_slots) == 0
    once = decided(load(), workers, now, num_slots=num_slots).target
    assert decided(load(), workers, once, num_slots=num_slots).action == "none"


@pytest.mark.parametrize("seed", range(20))
def test_no_decision_puts_experts_at_risk(seed: int) -> None:
    rng = random.Random(seed)
    workers = members(*(rng.choice("abc") for _ in range(DEVICES)))
    num_slots = rng.randint(3, 6)
    now = contiguous(SHAPES, DEVICES, num_redundant=num_slots - 2)
    for _ in range(4):
        fraction = rng.choice((0.0, 0.1, 0.5))
        decision = decided(load(rng), workers, now, fraction, num_slots)
        before, after = (at_risk(workers, p, num_slots) for p in (now, decision.target))
        assert after <= before
        if decision.action == "none":
            assert decision.target is now
        now = decision.target
