"""The first placement: where it is planned, for which load, and on which devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cluster.config.autoscale import AutoscaleSection
from cluster.config.cluster import ClusterConfig
from cluster.config.expert_load import RebalanceSection
from cluster.config.model import ModelSection
from cluster.config.resources import NodeResources
from cluster.config.workers import WorkersSection
from cluster.core.errors import ConfigError
from cluster.core.load_profile import BankLoad, LoadProfile, device_loads
from cluster.core.node_labels import DEVICE_SPEED, FAILURE_DOMAIN, LINK_CLASS, NodeLabels
from cluster.core.placement import BankShape, contiguous
from cluster.core.topology import Member
from cluster.load.view import balancedness_of
from cluster.sizing.start_plan import StartPlan, matches_banks, plan_start
from tests.cluster.controller.fakes_cluster import make_members

BANKS: list[dict[str, Any]] = [
    {"bank": "mlp", "layer": layer, "num_experts": 8, "top_k": 2} for layer in (0, 1)
]
SHAPES = [BankShape(bank="mlp", layer=layer, num_experts=8) for layer in (0, 1)]
PROFILE = LoadProfile(
    model="demo",
    top_k=2,
    tokens=100,
    banks=tuple(
        BankLoad(bank="mlp", layer=layer, counts=(50, 20, 10, 8, 5, 3, 2, 2)) for layer in (0, 1)
    ),
)
NODES = [NodeResources(node_id="a", address="10.0.0.1", cpus=8.0)]


def make_plan(profile: LoadProfile | None = PROFILE, **workers: Any) -> StartPlan:
    config = ClusterConfig(
        model=ModelSection(path="somewhere", served_model_name="demo"),
        workers=WorkersSection(num_expert_workers=4, **workers),
    )
    return plan_start(config, BANKS, NODES, profile=profile.to_dict() if profile else None)


def members_on(places: Sequence[tuple[str, NodeLabels]]) -> list[Member]:
    """An attention worker, and expert workers at these nodes."""
    attention, *experts = make_members(1, len(places))
    return [
        attention,
        *(
            replace(
                member,
                node=node,
                domain=place.domain,
                link_class=place.link_class,
                speed=place.speed,
            )
            for member, (node, place) in zip(experts, places, strict=True)
        ),
    ]


ONE_NODE = [("n0", NodeLabels())] * 4
TWO_NODES = [("n0", NodeLabels())] * 2 + [("n1", NodeLabels())] * 2


def test_without_a_wish_a_start_is_contiguous() -> None:
    plan = make_plan(num_redundant_experts=1)
    expected = contiguous(SHAPES, 4, 1)
    assert plan.placement == expected
    assert plan.with_members(members_on(ONE_NODE)).placement == expected
    assert make_plan().with_members(members_on(TWO_NODES)).placement == contiguous(SHAPES, 4)


def test_a_given_profile_is_planned_for(tmp_path: Path) -> None:
    path = str(tmp_path / "load.json")
    plan = make_plan(num_redundant_experts=1, load_profile=path).with_members(members_on(ONE_NODE))
    for bank, load in zip(plan.placement.banks, PROFILE.banks, strict=True):
        before = contiguous(SHAPES, 4, 1).banks[load.layer]
        planned, plain = (balancedness_of([device_loads(b, load.counts)]) for b in (bank, before))
        assert planned is not None
        assert plain is not None
        assert planned > 0.99 > 0.7 > plain
        assert all(len(slots) == plan.num_slots for slots in bank.physical_to_logical)


def test_with_rebalancing_on_the_models_own_profile_is_planned_for() -> None:
    config = ClusterConfig(
        model=ModelSection(path="somewhere", served_model_name="demo"),
        workers=WorkersSection(num_expert_workers=4, num_redundant_experts=1),
        rebalance=RebalanceSection(enable_eplb=True),
    )
    warm = plan_start(config, BANKS, NODES, profile=PROFILE.to_dict()).placement
    balance = balancedness_of([device_loads(warm.banks[0], PROFILE.banks[0].counts)])
    assert balance is not None
    assert balance > 0.99
    assert plan_start(config, BANKS, NODES).placement == contiguous(SHAPES, 4, 1)


def test_copies_are_in_two_failure_domains_where_slots_allow() -> None:
    """Nodes are domains unless labels say otherwise; there are 16 slots for 8 experts."""
    racks = [(f"n{i}", NodeLabels(domain=f"rack-{i % 2}")) for i in range(4)]
    for places in (TWO_NODES, racks):
        members = members_on(places)
        plan = make_plan(None, num_redundant_experts=2).with_members(members)
        domain = {m.device: m.domain or m.node for m in members if m.holds_experts}
        for bank in plan.placement.banks:
            for expert in range(8):
                copies = bank.logical_to_physical(expert)
                assert len({domain[device] for device, _ in copies}) == 2


def test_fast_devices_get_more_of_the_load() -> None:
    places = [("n0", NodeLabels(speed=3.0))] * 2 + [("n1", NodeLabels())] * 2
    plan = make_plan(None, num_redundant_experts=2).with_members(members_on(places))
    for bank in plan.placement.banks:
        assert device_loads(bank, [1] * 8) == pytest.approx((3, 3, 1, 1), rel=0.05)


def test_a_profile_of_another_model_counts_for_nothing() -> None:
    bank = BankLoad(bank="mlp", layer=0, counts=(1, 2, 3))
    other = LoadProfile(model="other", top_k=2, tokens=1, banks=(bank,))
    assert not matches_banks(other, BANKS)
    assert matches_banks(PROFILE, BANKS)
    plan = make_plan(other)
    assert plan.load is not None
    assert all(load.counts == (1.0,) * 8 for load in plan.load.banks)
    expected = make_plan().load
    assert expected is not None
    assert expected.banks == PROFILE.banks
    assert expected.top_k == 2


def test_labels_are_read() -> None:
    labels = {FAILURE_DOMAIN: "rack-7", LINK_CLASS: "pod-2", DEVICE_SPEED: "0.5"}
    assert NodeLabels.of(labels, "n0") == NodeLabels(domain="rack-7", link_class="pod-2", speed=0.5)
    assert NodeLabels.of({"ray.io/node-id": "x"}, "n0") == NodeLabels()


@pytest.mark.parametrize("text", ["fast", "0", "-1", "nan", "inf", ""])
def test_a_speed_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="device-speed of node n0"):
        NodeLabels.of({DEVICE_SPEED: text}, "n0")


@pytest.mark.parametrize(
    ("gpus", "most", "tokens"), [(0.0, None, 512), (8.0, None, 2048), (8.0, 4, 1024)]
)
def test_steps_are_larger_on_gpus(gpus: float, most: int | None, tokens: int) -> None:
    config = ClusterConfig(
        model=ModelSection(path="somewhere", served_model_name="demo"),
        autoscale=AutoscaleSection(
            autoscale="off" if most is None else "on", max_attention_workers=most
        ),
    )
    node = NodeResources(node_id="a", address="a", cpus=8.0, gpus=gpus)
    assert plan_start(config, BANKS, [node]).config.engine.step_tokens == tokens


def test_only_labelled_nodes_can_be_followed() -> None:
    config = ClusterConfig(
        model=ModelSection(path="somewhere", served_model_name="demo"),
        workers=WorkersSection(follow_nodes=True),
    )
    gateway, attention, expert = (
        NodeResources(node_id=role, address=role, cpus=8.0, labels=NodeLabels(role=role))
        for role in ("gateway", "attention", "expert")
    )
    for nodes in (NODES, [gateway, attention, *NODES], [gateway, expert]):
        with pytest.raises(ConfigError, match=r"follow_nodes .* needs nodes that are labelled"):
            plan_start(config, BANKS, nodes)
    assert plan_start(config, BANKS, [gateway, attention, expert]).config.workers.follow_nodes


def test_a_placement_and_a_profile_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="together with placement_file"):
        WorkersSection(placement_file="a", load_profile="b")


def test_a_plan_survives_the_way_to_the_workers() -> None:
    plan = make_plan(num_redundant_experts=1, load_profile="x").with_members(members_on(TWO_NODES))
    expert = make_members(1, 4)[1]
    *_, extra = json.loads(json.dumps(plan.arguments(expert, "here:1")))
    assert extra["placement"] == plan.placement.to_dict()
