"""CPU and GPU accounting, and what a start comes to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection
from cluster.config.resources import NodeResources, WorkerShare, plan_shares, resolved_share
from cluster.config.transport import Transport, TransportSection
from cluster.config.workers import Device, Mode, WorkersSection
from cluster.core.errors import ConfigError
from cluster.core.topology import Role
from cluster.sizing.start_plan import plan_start
from tests.cluster.controller.fakes_cluster import make_members

BANKS = [{"bank": "mlp", "layer": 0, "num_experts": 8, "top_k": 2}]


def _nodes(*cpus: float, gpus: float = 0.0) -> list[NodeResources]:
    return [
        NodeResources(node_id=f"id{i}", address=f"10.0.0.{i}", cpus=c, gpus=gpus)
        for i, c in enumerate(cpus)
    ]


def _workers(
    attention: int = 1,
    experts: int = 2,
    *,
    cpus: float | None = None,
    gpus: float | None = None,
    device: Device = "auto",
) -> WorkersSection:
    return WorkersSection(
        num_attention_workers=attention,
        num_expert_workers=experts,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
        device=device,
    )


def test_the_default_is_a_fraction_and_one_thread() -> None:
    share = plan_shares(_workers(), _nodes(2))
    assert share == WorkerShare(cpus=0.6666, gpus=0.0, device="cpu")
    assert share.threads == 1


@pytest.mark.parametrize(
    ("mode", "cores", "cpus", "threads"),
    [
        ("local", (2,), 2.0, 2),
        ("local", (4, 8), 8.0, 8),  # a worker does not span nodes
        ("local", (0.5,), 0.5, 1),
        ("disaggregated", (6,), 2.0, 2),
        ("disaggregated", (16,), 5.3333, 5),  # 5.3 each: no core has two threads
        ("disaggregated", (4, 4, 4), 4.0, 4),
    ],
)
def test_a_worker_computes_with_all_its_whole_cores(
    mode: Mode, cores: tuple[float, ...], cpus: float, threads: int
) -> None:
    share = plan_shares(WorkersSection(mode=mode), _nodes(*cores))
    assert (share.cpus, share.threads) == (cpus, threads)


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1.0, 1), (1.9, 1), (3.0, 3)])
def test_explicit_cpus_decide_the_threads(cpus: float, threads: int) -> None:
    assert plan_shares(_workers(1, 1, cpus=cpus), _nodes(8), free_cpus=1.0).threads == threads


@pytest.mark.parametrize(
    ("cpus", "workers", "expected"),
    [
        ((1, 1, 1), 3, 1.0),
        ((1, 1, 1), 4, 0.5),  # 0.75 would leave the fourth without a node
        ((4, 2), 3, 2.0),
        ((3, 2), 4, 1.0),
        ((0, 4), 3, 1.3333),
        ((2,), 500, 0.004),
    ],
)
def test_default_shares_fit_on_the_nodes(
    cpus: tuple[float, ...], workers: int, expected: float
) -> None:
    share = plan_shares(_workers(1, workers - 1), _nodes(*cpus))
    assert share.cpus == pytest.approx(expected)
    assert sum(int(c / share.cpus + 1e-9) for c in cpus) >= workers
    assert share.cpus <= sum(cpus) / workers


def test_colocated_workers_count_once() -> None:
    pair = WorkersSection(mode="colocated", num_expert_workers=2)
    assert plan_shares(pair, _nodes(2)).cpus == 1.0
    half = replace(pair, gpus_per_worker=0.5)
    assert plan_shares(half, _nodes(2, gpus=1)).gpus == 0.5
    with pytest.raises(ConfigError, match=r"3 workers need 1\.5 GPUs"):
        plan_shares(replace(half, num_expert_workers=3), _nodes(2, gpus=1))


@pytest.mark.parametrize(
    ("others", "cpus", "expected"),
    [
        ((("attention", 1), ("expert", 2)), (2,), 0.3333),  # 6 workers in all
        ((("attention", 1),), (8,), 2.0),
        ((("attention", 1), ("expert", 2)), (3, 3), 1.0),
        ((("colocated", 5),), (4, 4), 1.0),
    ],
)
def test_workers_of_all_models_share_the_cpus_equally(
    others: tuple[tuple[Role, int], ...], cpus: tuple[float, ...], expected: float
) -> None:
    share = plan_shares(replace(_workers(), other_pools=others), _nodes(*cpus))
    assert share.cpus == pytest.approx(expected)
    back = WorkersSection(
        mode="colocated",
        num_expert_workers=sum(number for _, number in others),
        other_pools=(("attention", 1), ("expert", 2)),
    )
    assert plan_shares(back, _nodes(*cpus)).cpus == share.cpus, "whichever model is asked"


def test_free_cpus_are_shared_by_the_workers_of_all_models() -> None:
    workers = replace(_workers(), other_pools=(("attention", 3),))
    assert plan_shares(workers, _nodes(6), free_cpus=3.0).cpus == 0.5
    assert plan_shares(workers, _nodes(6)).cpus == 1.0


def test_explicit_cpus_are_checked_for_the_own_workers() -> None:
    workers = replace(_workers(cpus=1.0), other_pools=(("attention", 1), ("expert", 2)))
    assert plan_shares(workers, _nodes(3)).cpus == 1.0
    with pytest.raises(ConfigError, match=r"3 workers need 3 CPUs, the cluster has 2 "):
        plan_shares(workers, _nodes(2))


def test_gpus_are_taken_when_the_workers_of_all_models_can_have_one() -> None:
    workers = replace(_workers(), other_pools=(("attention", 1), ("expert", 2)))
    assert plan_shares(workers, _nodes(8, gpus=6)).device == "cuda"
    assert plan_shares(workers, _nodes(8, gpus=5)).device == "cpu"
    by_name = replace(workers, device="cuda")
    assert plan_shares(by_name, _nodes(8, gpus=3)).gpus == 0.5
    explicit = replace(_workers(gpus=1.0), other_pools=(("attention", 1), ("expert", 2)))
    assert plan_shares(explicit, _nodes(8, gpus=3)).gpus == 1.0


def test_a_busy_cluster_makes_default_shares_smaller() -> None:
    assert plan_shares(_workers(), _nodes(3), free_cpus=1.0).cpus == pytest.approx(0.3333)
    assert plan_shares(_workers(), _nodes(3), free_cpus=0.0).cpus == 0.0
    assert plan_shares(_workers(), _nodes(0)).cpus == 0.0


@pytest.mark.parametrize(
    ("mode", "cores", "free", "cpus", "threads"),
    [
        ("local", (2,), 1.9, 1.9, 2),  # a tenth of a CPU is an actor that rarely computes
        ("local", (2,), 1.4, 1.4, 1),
        ("local", (2,), 0.0, 0.0, 1),
        ("disaggregated", (16, 16, 16), 42.0, 14.0, 14),
        ("disaggregated", (6,), 5.9, 1.9666, 2),
    ],
)
def test_what_others_compute_with_is_left_to_them(
    mode: Mode, cores: tuple[float, ...], free: float, cpus: float, threads: int
) -> None:
    share = plan_shares(WorkersSection(mode=mode), _nodes(*cores), free)
    assert (share.cpus, share.threads) == (cpus, threads)


def test_explicit_cpus_that_are_not_there_are_refused() -> None:
    assert plan_shares(_workers(cpus=1.0), _nodes(3)).cpus == 1.0
    with pytest.raises(ConfigError) as caught:
        plan_shares(_workers(cpus=1.5), _nodes(2, 1))
    assert str(caught.value) == (
        "cpus_per_worker (1.5) does not fit: 3 workers need 4.5 CPUs, "
        "the cluster has 3 (10.0.0.0: 2, 10.0.0.1: 1)"
    )


def test_a_worker_does_not_span_nodes() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        plan_shares(_workers(cpus=2.0), _nodes(3, 3))


def test_gpus_are_taken_when_every_worker_can_have_one() -> None:
    assert plan_shares(_workers(), _nodes(8, gpus=4)).device == "cuda"
    assert plan_shares(_workers(), _nodes(8, gpus=2)).device == "cpu"
    assert plan_shares(_workers(device="cpu"), _nodes(8, gpus=4)).gpus == 0.0


def test_cuda_by_name_takes_a_fraction_where_there_are_few() -> None:
    assert plan_shares(_workers(device="cuda"), _nodes(8, gpus=1)).gpus == 0.3333
    assert plan_shares(_workers(device="cuda"), _nodes(8, gpus=8)).gpus == 1.0


@pytest.mark.parametrize(
    ("workers", "gpus", "words"),
    [
        (_workers(device="cuda"), 0, "needs GPUs, but the Ray cluster has none"),
        (_workers(gpus=1.0), 2, "need 3 GPUs, the cluster has 2"),
        (_workers(gpus=0.5, device="cpu"), 2, "must be 0 with device cpu"),
        (_workers(gpus=0.0, device="cuda"), 2, "must be above 0 with device cuda"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    workers: WorkersSection, gpus: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_shares(workers, _nodes(8, gpus=gpus))


def _config(workers: WorkersSection, transport: Transport = "auto") -> ClusterConfig:
    return ClusterConfig(
        model=ModelSection(path="somewhere", served_model_name="demo"),
        workers=workers,
        transport=TransportSection(transport=transport),
    )


@pytest.mark.parametrize(
    ("transport", "device", "gpus", "is_collective"),
    [
        ("auto", "cpu", 0, False),
        ("auto", "cuda", 3, True),
        ("auto", "cuda", 2, False),
        ("auto", "auto", 2, False),
        ("sockets", "cuda", 3, False),
        ("collective", "cuda", 3, True),
        ("collective", "cpu", 0, True),
    ],
)
def test_auto_is_collective_where_each_worker_has_a_gpu(
    transport: Transport, device: Device, gpus: int, is_collective: bool
) -> None:
    plan = plan_start(_config(_workers(device=device), transport), BANKS, _nodes(8, gpus=gpus))
    assert plan.config.is_collective == is_collective


def test_nccl_is_refused_before_the_start_where_workers_share_a_gpu() -> None:
    """It would refuse itself, again and again, which looks like lost workers."""
    words = r"^transport \(collective\) needs gpus_per_worker of at least 1, not 0\.3333: NCCL "
    with pytest.raises(ConfigError, match=words):
        plan_start(_config(_workers(device="cuda"), "collective"), BANKS, _nodes(8, gpus=1))
    with pytest.raises(ConfigError, match=r"at least 1, not 0\.5"):
        _config(_workers(gpus=0.5), "collective")


def test_a_start_plan_resolves_the_configuration() -> None:
    plan = plan_start(_config(_workers()), BANKS, _nodes(2))
    assert plan.config.workers.device == "cpu"
    assert plan.config.workers.cpus_per_worker == 0.6666
    assert plan.config.workers.gpus_per_worker == 0.0
    assert plan.num_slots == 4
    attention, expert, _ = make_members(1, 2)
    assert plan.arguments(attention, "")[-1] == {"threads": 1}
    assert plan.arguments(expert, "")[-1]["placement"] == plan.placement.to_dict()
    assert plan.arguments(expert, "")[-1]["num_slots"] == 4


def test_slots_are_apart_from_copies() -> None:
    workers = WorkersSection(num_redundant_experts=2, recovery_slots=3)
    assert plan_start(_config(workers), BANKS, _nodes(2)).num_slots == 4 + 2 + 3


def test_local_mode_gives_the_experts_to_the_attention_worker() -> None:
    plan = plan_start(_config(WorkersSection(mode="local")), BANKS, _nodes(2))
    assert (plan.share.cpus, plan.share.threads) == (2.0, 2)
    assert resolved_share(plan.config.workers) == plan.share, "for a restarted controller"
    assert plan.arguments(make_members(1, 0)[0], "")[-1]["threads"] == 2
    assert plan.placement.num_devices == 1
    assert plan.arguments(make_members(1, 0)[0], "")[-1]["num_slots"] == 8


def test_a_placement_file_is_used(tmp_path: Path) -> None:
    maps = [[0, 1, 2, 3], [4, 5, 6, 7]]
    data = {
        "schema": 1,
        "epoch": 5,
        "banks": [{"bank": "mlp", "layer": 0, "physical_to_logical": maps[::-1]}],
    }
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(data))
    workers = WorkersSection(placement_file=str(path))
    plan = plan_start(_config(workers), BANKS, _nodes(2))
    assert plan.placement.banks[0].physical_to_logical == ((4, 5, 6, 7), (0, 1, 2, 3))


def test_more_expert_workers_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="more workers than can ever have work"):
        plan_start(_config(_workers(1, 9)), BANKS, _nodes(2))
