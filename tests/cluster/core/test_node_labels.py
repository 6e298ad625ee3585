"""Labels of Ray nodes: how they are read, and which roles a node may run."""

from __future__ import annotations

import pytest

from cluster.config.resources import NodeResources, nodes_for, plan_shares
from cluster.config.workers import WorkersSection
from cluster.core.errors import ConfigError
from cluster.core.node_labels import ROLE, NodeLabels, selector_for


def node(name: str, role: str, cpus: float, gpus: float = 0.0) -> NodeResources:
    return NodeResources(
        node_id=name, address=name, cpus=cpus, gpus=gpus, labels=NodeLabels(role=role)
    )


HEAD = node("head", "", 0.0)
GATEWAY = node("gateway", "gateway", 8.0)
ATTENTION = node("attention", "attention", 4.0, gpus=2.0)
EXPERTS = [node("experts-0", "expert", 6.0, gpus=2.0), node("experts-1", "expert", 6.0, gpus=2.0)]
ALL = [HEAD, GATEWAY, ATTENTION, *EXPERTS]


def test_labels_are_read_and_checked() -> None:
    place = NodeLabels.of({ROLE: "expert", "expertmesh/failure-domain": "rack-7"}, "a")
    assert (place.role, place.domain) == ("expert", "rack-7")
    with pytest.raises(ConfigError, match=r"label expertmesh/role of node a \(experts\) must be"):
        NodeLabels.of({ROLE: "experts"}, "a")


def test_a_role_runs_on_the_nodes_that_are_labelled_for_it() -> None:
    assert nodes_for("expert", ALL) == tuple(EXPERTS)
    assert nodes_for("attention", ALL) == (ATTENTION,)
    assert nodes_for("attention", [HEAD, GATEWAY]) == (HEAD,)
    assert nodes_for("expert", [HEAD]) == (HEAD,)


def test_ray_gets_the_same_selector() -> None:
    places = [n.labels for n in ALL]
    assert selector_for("expert", places) == {ROLE: "expert"}
    assert selector_for("colocated", places)[ROLE].startswith("!in(attention,")
    assert selector_for("expert", [HEAD.labels]) == {}


def test_shares_fit_every_pool_on_its_own_nodes() -> None:
    workers = WorkersSection(num_attention_workers=1, num_expert_workers=4)
    assert plan_shares(workers, ALL).cpus == 3.0
    assert plan_shares(workers, ALL).gpus == 1.0
    alone = WorkersSection(num_attention_workers=1, num_expert_workers=2)
    assert plan_shares(alone, ALL).cpus == 4.0
    too_many = WorkersSection(num_attention_workers=3, num_expert_workers=4, gpus_per_worker=1.0)
    with pytest.raises(ConfigError, match=r"3 workers need 3 GPUs, .* has 2 \(attention: 2\)"):
        plan_shares(too_many, ALL)
