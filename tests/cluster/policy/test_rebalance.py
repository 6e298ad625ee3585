"""The rebalancing policy: what it decides, and that it never decides for the worse."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from cluster.config.cluster import ClusterConfig
from cluster.config.expert_load import RebalanceSection
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.core.errors import ConfigError
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import (
    FREE_SLOT,
    BankPlacement,
    BankShape,
    ExpertPlacement,
    contiguous,
)
from cluster.planner.base import PlannedTopology, planned_topology
from cluster.planner.mesh import resolved
from cluster.planner.stages import held_by
from cluster.policy.rebalance import (
    CurrentLoad,
    RebalanceDecision,
    decide_placement,
    mixed_balancedness,
    why_impossible,
)
from cluster.sizing.replay import ExpertStepCost, simulate_window
from tests.cluster.controller.fakes_cluster import make_members

pytestmark = pytest.mark.heavy

EXPERTS = 16
DEVICES = 4
SHAPES = tuple(BankShape(bank="mlp", layer=i, num_experts=EXPERTS) for i in range(3))
MEMBERS = make_members(1, DEVICES)[1:]
SECTION = RebalanceSection(max_move_fraction=0.3)
STEP = ExpertStepCost(slot_s=8e-6, token_s=1e-6, expert_bytes=1000)


def decided(
    some: CurrentLoad,
    topology: PlannedTopology,
    now: ExpertPlacement,
    section: RebalanceSection = SECTION,
    step: ExpertStepCost = STEP,
) -> RebalanceDecision:
    return decide_placement(some, topology, now, section, step)


def profile(seed: int, skew: float = 0.8) -> LoadProfile:
    """Zipf-like counts, shuffled for each layer."""
    rng = random.Random(seed)
    banks = []
    for shape in SHAPES:
        counts = [1000.0 / (1 + i) ** skew for i in range(EXPERTS)]
        rng.shuffle(counts)
        banks.append(BankLoad(bank="mlp", layer=shape.layer, counts=tuple(counts)))
    return LoadProfile(model="demo", top_k=2, tokens=1000, banks=tuple(banks))


def current(num_redundant: int = 1) -> ExpertPlacement:
    return contiguous(SHAPES, DEVICES, num_redundant, epoch=5)


def make_config(**workers: Any) -> ClusterConfig:
    """One that follows the load."""
    return ClusterConfig(
        model=ModelSection(path="x", served_model_name="x"),
        workers=WorkersSection(**workers),
        rebalance=RebalanceSection(enable_eplb=True),
    )


def load(seed: int = 0, skew: float = 0.8, prefill_share: float = 0.3) -> CurrentLoad:
    return CurrentLoad(profile=profile(seed, skew), prefill_share=prefill_share)


def test_a_skewed_load_is_worth_a_move() -> None:
    now = current()
    topology = planned_topology(MEMBERS, now, 5)
    decision = decided(load(), topology, now, SECTION)
    assert decision.action == "move"
    assert decision == decided(load(), topology, now, SECTION)
    assert 0 < decision.num_moves <= 0.3 * 3 * DEVICES * 5
    assert decision.num_bytes == 1000 * decision.num_moves
    assert decision.time_ratio < 0.97
    assert decision.gain_s > decision.cost_s
    assert decision.balancedness_now is not None
    assert decision.balancedness_then is not None
    assert decision.balancedness_then > decision.balancedness_now + 0.05


def test_the_time_ratio_is_that_of_a_row_of_the_mix() -> None:
    now = current()
    topology = planned_topology(MEMBERS, now, 5)
    decision = decided(load(), topology, now, SECTION)
    step = STEP

    def row_s(placement: ExpertPlacement) -> float:
        window = simulate_window(load().profile, topology, placement, step)
        prefill_s = window.prefill_step_s / step.prefill_tokens
        return 0.3 * prefill_s + 0.7 * window.decode_step_s / step.decode_tokens

    expected = row_s(decision.target) / row_s(now.packed())
    assert decision.time_ratio == pytest.approx(expected)


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.1, 0.2])
def test_all_moves_together_keep_to_their_share_of_the_slots(fraction: float) -> None:
    now = current()
    topology = planned_topology(MEMBERS, now, 5)
    limit = int(fraction * 3 * DEVICES * 5)
    section = replace(SECTION, max_move_fraction=fraction, horizon_s=1e6)
    for seed in range(6):
        decision = decided(load(seed, skew=1.5, prefill_share=0.1), topology, now, section)
        assert 0 < decision.num_moves <= limit


def test_a_short_horizon_or_a_slow_link_is_not() -> None:
    now = current()
    topology = planned_topology(MEMBERS, now, 5)
    brief = replace(SECTION, horizon_s=0.01)
    decision = decided(load(), topology, now, brief)
    assert decision.action == "none"
    assert decision.target == now
    assert (decision.num_moves, decision.num_bytes) == (0, 0)
    assert "s won within 0.01 s" in decision.reason
    slow = replace(SECTION, bytes_per_s=1.0)  # an expert takes a quarter of an hour
    assert decided(load(), topology, now, slow).action != "move"


@pytest.mark.parametrize("skew", [0.02, 0.05])
def test_a_gain_of_one_percent_is_noise_however_long_it_lasts(skew: float) -> None:
    now = current()
    topology = planned_topology(MEMBERS, now, 5)
    decision = decided(load(skew=skew), topology, now, replace(SECTION, horizon_s=1e6))
    assert decision.action == "none"
    assert decision.gain_s > decision.cost_s
    assert 0.985 < decision.time_ratio < 1.0


def test_without_moves_the_shares_alone_are_weighed() -> None:
    now = current(num_redundant=2)
    topology = planned_topology(MEMBERS, now, 6)
    decision = decided(
        load(prefill_share=1.0), topology, now, replace(SECTION, max_move_fraction=0.0)
    )
    assert decision.action == "split"
    assert decision.num_bytes == 0
    for old, new in zip(now.banks, decision.target.banks, strict=True):
        for device in range(DEVICES):
            assert held_by(old, device) == held_by(new, device)
    assert decision.target.banks != now.banks


def test_where_moves_cost_too_much_the_shares_alone_change() -> None:
    now = current(num_redundant=2)
    topology = planned_topology(MEMBERS, now, 6)
    slow = replace(SECTION, bytes_per_s=1.0)
    decision = decided(load(prefill_share=1.0), topology, now, slow)
    assert decision.action == "split"
    assert decision.gain_s > decision.cost_s


def test_a_gain_that_equals_its_cost_is_not_worth_a_change() -> None:
    now = current(num_redundant=2)
    topology = planned_topology(MEMBERS, now, 6)
    section = replace(SECTION, max_move_fraction=0.0)
    some = load(prefill_share=1.0)
    first = decided(some, topology, now, section)
    even_s = first.cost_s / (1.0 - first.time_ratio)
    even = decided(some, topology, now, replace(section, horizon_s=even_s))
    assert even.gain_s == even.cost_s
    assert even.action == "none"
    longer = replace(section, horizon_s=1.01 * even_s)
    assert decided(some, topology, now, longer).action == "split"


def test_where_experts_take_no_time_nothing_changes() -> None:
    now, step = current(), replace(STEP, slot_s=0.0, token_s=0.0)
    topology = planned_topology(MEMBERS, now, 5)
    decision = decided(load(), topology, now, step=step)
    assert (decision.action, decision.time_ratio) == ("none", 1.0)


def test_a_move_costs_a_tenth_of_its_time_and_three_switches_and_shares_cost_one() -> None:
    now = current()
    topology = planned_topology(MEMBERS, now, 5)
    decision = decided(load(), topology, now, replace(SECTION, bytes_per_s=10_000.0))
    assert decision.action == "move"
    into = [
        sum(
            len(held_by(new, device) - held_by(old, device))
            for old, new in zip(now.banks, decision.target.banks, strict=True)
        )
        for device in range(DEVICES)
    ]
    assert sum(into) == decision.num_moves > max(into)
    assert decision.cost_s == pytest.approx(0.1 * max(into) * 1000 / 10_000.0 + 3 * 0.05)
    still = replace(SECTION, max_move_fraction=0.0)
    assert decided(load(), topology, now, still).cost_s == 0.05


def test_moves_for_decodes_weigh_a_slot_against_its_tokens() -> None:
    """Reading an expert's weights takes as long as computing 8 of a step's 32 pairs."""
    now = current()
    step = replace(STEP, decode_tokens=16)
    decision = decided(
        load(1, skew=1.2, prefill_share=0.0),
        planned_topology(MEMBERS, now, 5),
        now,
        step=step,
    )
    assert decision.action == "move"
    assert decision.time_ratio < 0.98


def test_balancedness_mixes_the_loads_of_prompts_and_decodes() -> None:
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=2,
        physical_to_logical=[[0, 1], [0]],
        split=[[0.5, 1.0], [0.5]],
        decode_device=[0, 0],
    )
    placement = ExpertPlacement(epoch=1, banks=(bank,))
    banks = (BankLoad(bank="mlp", layer=0, counts=(8, 0)),)
    some = LoadProfile(model="demo", top_k=1, tokens=8, banks=banks)
    # prompts put 4 tokens on each device, decodes all 8 on the first: 3/4 and 1/4 of both are 5, 3
    assert mixed_balancedness(placement, CurrentLoad(profile=some, prefill_share=1.0)) == 1.0
    assert mixed_balancedness(
        placement, CurrentLoad(profile=some, prefill_share=0.75)
    ) == pytest.approx(4 / 5)
    assert mixed_balancedness(placement, CurrentLoad(profile=some, prefill_share=0.0)) == 0.5


def test_an_even_load_is_left_alone() -> None:
    now = current()
    topology = planned_topology(MEMBERS, now, 5)
    placed = decided(load(skew=0.0), topology, now, SECTION)
    moved = structs.replace(now, banks=placed.target.banks)
    assert decided(load(skew=0.0), topology, moved, SECTION).action == "none"


def test_what_was_decided_is_not_decided_again() -> None:
    now = current()
    section = replace(SECTION, max_move_fraction=1.0)
    for _ in range(4):
        decision = decided(load(), planned_topology(MEMBERS, now, 5), now, section)
        now = decision.target
    assert decision.action == "none"


@pytest.mark.parametrize("seed", range(20))
def test_a_change_is_never_predicted_to_be_worse(seed: int) -> None:
    rng = random.Random(seed)
    now = current(rng.randint(0, 2))
    some = load(seed, rng.uniform(0.0, 2.0), rng.random())
    decision = decided(some, planned_topology(MEMBERS, now, 4 + rng.randint(1, 3)), now, SECTION)
    assert decision.time_ratio <= 1.0 + 1e-9 or decision.action == "none"


def test_lost_devices_get_nothing_and_full_ones_keep_what_they_have() -> None:
    now = current(num_redundant=4).without_devices(frozenset({1}), 6)
    assert now is not None
    alive = [m for m in MEMBERS if m.device != 1]
    topology = planned_topology(alive, now, 6)
    assert [d.num_expert_slots for d in topology.devices] == [8, 0, 8, 8]
    decision = decided(load(), topology, now, SECTION)
    for bank in decision.target.banks:
        assert held_by(bank, 1) == frozenset()


def test_workers_of_one_failure_domain_count_as_domains_of_their_own() -> None:
    def domains(*places: tuple[str, str]) -> list[int]:
        members = [
            structs.replace(member, node=node, domain=domain)
            for member, (node, domain) in zip(MEMBERS[: len(places)], places, strict=True)
        ]
        found: list[int] = planned_topology(members, current(), 5).domains.tolist()
        return found[: len(places)]

    assert domains(("n0", ""), ("n0", ""), ("n0", "")) == [0, 1, 2]
    assert domains(("n0", ""), ("n0", ""), ("n1", "")) == [0, 0, 1]
    assert domains(("n0", "rack-a"), ("n0", "rack-a"), ("n1", "rack-a")) == [0, 1, 2]
    assert domains(("n0", "rack-a"), ("n1", "rack-b"), ("n2", "rack-b")) == [0, 1, 1]


def test_too_few_slots_are_an_error_of_their_own() -> None:
    now = current()
    topology = planned_topology([], now, 5)
    with pytest.raises(ConfigError):
        decided(load(), topology, now, SECTION)


def test_shares_are_solved_without_touching_slots() -> None:
    now = current(num_redundant=2)
    gaps = structs.replace(
        now,
        banks=tuple(
            b.with_slots([[*row[:2], FREE_SLOT, *row[2:]] for row in b.physical_to_logical])
            for b in now.banks
        ),
    )
    some = profile(3)
    better = resolved(some, planned_topology(MEMBERS, gaps, 6), gaps)
    assert better.epoch == gaps.epoch
    for old, new in zip(gaps.banks, better.banks, strict=True):
        assert old.physical_to_logical == new.physical_to_logical
    before, after = (
        mixed_balancedness(gaps, CurrentLoad(profile=some, prefill_share=1.0)),
        mixed_balancedness(better, CurrentLoad(profile=some, prefill_share=1.0)),
    )
    assert before is not None
    assert after is not None
    assert after > before
    assert all(FREE_SLOT not in row for b in gaps.packed().banks for row in b.physical_to_logical)


def test_a_stage_may_hold_more_than_is_planned() -> None:
    """On the way recovery slots are used; the shares are solved for what is there."""
    now = current(num_redundant=1)
    more = tuple(
        b.with_slots(
            [[*row, e] for row, e in zip(b.physical_to_logical, (9, 13, 1, 5), strict=True)]
        )
        for b in now.banks
    )
    stage = structs.replace(now, banks=more)
    assert all(len(row) == 6 for b in stage.banks for row in b.physical_to_logical)
    better = resolved(profile(2), planned_topology(MEMBERS, stage, 5), stage)
    assert [b.physical_to_logical for b in better.banks] == [b.physical_to_logical for b in more]
    with pytest.raises(ConfigError):
        resolved(profile(2), planned_topology(MEMBERS, now, 5), stage)


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ({"mode": "local"}, "one worker holds all experts"),
        ({"num_expert_workers": 1, "num_redundant_experts": 1}, "one expert worker"),
        ({"num_expert_workers": 3}, "no spare expert slots"),
        ({"num_expert_workers": 2, "recovery_slots": 1}, ""),
        ({"num_expert_workers": 3, "recovery_slots": 2, "num_redundant_experts": 2}, ""),
        ({"num_expert_workers": 3, "num_redundant_experts": 1}, ""),
    ],
)
def test_what_makes_it_impossible_is_said(workers: dict[str, object], reason: str) -> None:
    config = make_config(**workers)
    found = why_impossible(config, config.workers.num_expert_workers)
    assert reason in found
    assert bool(found) is bool(reason)
