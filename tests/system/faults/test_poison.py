"""A request that kills the workers that run it is found, and all other requests continue."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    ThreadWorkerGroup,
    connected_ray,
    serving,
)
from cluster.config.cluster import ClusterConfig
from cluster.core.errors import PoisonousRequestError
from cluster.core.topology import Role
from tests.harness.fault_rows import (
    FULL,
    SMALL,
    Form,
    blocks_held,
    check_answers,
    quiet_config,
    undisturbed,
)
from tests.harness.poison import (
    PoisonedGroup,
    PoisonedWorker,
    poisonous_call,
    raise_poison,
    stop_an_expert_worker,
)
from tests.harness.tiers import quick_rows
from workers.process.worker.actor import ACTOR_CLASSES, WorkerActor


def find_the_poison(cluster: ServingCluster, form: Form) -> None:
    """The poisonous call fails by name; the others are answered as undisturbed."""
    with gateway_of(cluster) as gateway:
        streams = gateway.stream(make_calls(form.num_streams, form.num_tokens))
        streams.wait_tokens(form.num_streams * form.num_tokens // 4)
        poison = gateway.stream([poisonous_call()], "poison")
        with pytest.raises(PoisonousRequestError, match="third worker in a row"):
            poison.finish()
        check_answers(streams.finish(), undisturbed(form))
        cluster.wait(lambda snapshot: blocks_held(snapshot) == 0, fresh=True)


KILLS: dict[str, tuple[ClusterConfig, Callable[[ThreadWorkerGroup], None]]] = {
    "attention": (quiet_config(4, 1), raise_poison),
    "expert": (quiet_config(2, 4, num_redundant=48), stop_an_expert_worker),
}


@pytest.mark.parametrize("role", quick_rows({"expert"}, KILLS))
def test_a_poisonous_request_fails_alone(role: str) -> None:
    config, kill = KILLS[role]
    cluster = ThreadCluster(config, PoisonedGroup(kill))
    with serving(cluster):
        find_the_poison(cluster, SMALL)
        check_losses(cluster, role)


def test_gateways_that_answer_too_late_accuse_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most offers to run alone are withdrawn before their answers come."""
    monkeypatch.setattr("workers.engine.isolation.ACKNOWLEDGE_LIMIT_S", 0.004)
    config, kill = KILLS["attention"]
    with serving(ThreadCluster(config, PoisonedGroup(kill))) as cluster:
        find_the_poison(cluster, SMALL)


@pytest.mark.ray
@pytest.mark.slow
def test_a_poisonous_request_that_kills_processes_fails_alone() -> None:
    with connected_ray():
        classes: dict[Role, type[WorkerActor]] = {**ACTOR_CLASSES, "attention": PoisonedWorker}
        with serving(RayCluster(row_config(4, 1), classes)) as cluster:
            find_the_poison(cluster, FULL)
            check_losses(cluster, "attention")


def check_losses(cluster: ServingCluster, role: str) -> None:
    """Three workers died, and no more; others may have taken their places since."""
    causes = "; ".join(entry["cause"] for entry in cluster.snapshot()["history"])
    lost = re.findall(r"lost ([\w.-]+):", causes)
    assert len(lost) == 3, causes
    assert {name.partition("-")[0] for name in lost} == {role}
