"""What a worker makes of the plain data that it is started with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.core.codec import to_plain
from cluster.core.topology import Member
from workers.process.worker_args import WorkerArgs

MEMBER = Member(name="attention-0", role="attention", rank=0, device=-1)


def args_of(workers: WorkersSection) -> WorkerArgs:
    model = ModelSection(path="p", served_model_name="m")
    return WorkerArgs(
        config=ClusterConfig(model=model, workers=workers),
        member=MEMBER,
        control_address="127.0.0.1:1",
        host="127.0.0.1",
    )


def test_a_worker_has_the_threads_that_it_is_given() -> None:
    config = ClusterConfig(model=ModelSection(path="p", served_model_name="m"))
    args = WorkerArgs.from_plain(
        config.to_dict(), to_plain(MEMBER), "127.0.0.1:1", {"threads": 3}, "127.0.0.1"
    )
    assert args.threads == 3
    assert args.config == config
    assert args.member == MEMBER


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        (WorkersSection(device="cpu"), ""),
        (WorkersSection(device="cpu", kernels="torch"), "as configured"),
        (WorkersSection(device="cuda"), "on CUDA"),
    ],
)
def test_compiled_kernels_compute_where_nothing_is_against_them(
    workers: WorkersSection, reason: str
) -> None:
    assert args_of(workers).torch_reason == reason


def test_a_worker_on_a_gpu_tells_its_name_and_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="NVIDIA H200", memory_clock_rate=3_201_000, memory_bus_width=6144)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    facts = args_of(WorkersSection(device="cuda")).device_facts
    assert facts["device"] == "cuda:0"
    assert facts["gpu"] == "NVIDIA H200"
    assert facts["gpu_bandwidth_bytes_s"] == pytest.approx(4.917e12, rel=1e-3)
    assert args_of(WorkersSection(device="cpu")).device_facts.keys() == {"host", "device"}
