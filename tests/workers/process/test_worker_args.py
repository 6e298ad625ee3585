"""What a worker makes of the plain data that it is started with."""

from __future__ import annotations

import pytest

from cluster.config.cluster import ClusterConfig, EngineSection, ModelSection, WorkersSection
from cluster.core.codec import to_plain
from cluster.core.topology import Member
from workers.process.worker_args import WorkerArgs

MEMBER = Member(name="attention-0", role="attention", rank=0, device=-1)


@pytest.mark.parametrize(("deterministic", "threads"), [(False, 3), (True, 1)])
def test_deterministic_workers_have_one_thread_whatever_their_share(
    deterministic: bool, threads: int
) -> None:
    config = ClusterConfig(
        model=ModelSection(path="p", served_model_name="m"),
        engine=EngineSection(deterministic=deterministic),
    )
    args = WorkerArgs.from_plain(
        config.to_dict(), to_plain(MEMBER), "127.0.0.1:1", {"threads": 3}, "127.0.0.1"
    )
    assert args.threads == threads
    assert args.config == config
    assert args.member == MEMBER


@pytest.mark.parametrize(
    ("workers", "engine", "reason"),
    [
        (WorkersSection(device="cpu"), EngineSection(), ""),
        (WorkersSection(device="cpu", kernels="torch"), EngineSection(), "as configured"),
        (WorkersSection(device="cuda"), EngineSection(), "on CUDA"),
        (WorkersSection(device="cpu"), EngineSection(deterministic=True), "deterministic"),
    ],
)
def test_compiled_kernels_compute_where_nothing_is_against_them(
    workers: WorkersSection, engine: EngineSection, reason: str
) -> None:
    model = ModelSection(path="p", served_model_name="m")
    args = WorkerArgs(
        config=ClusterConfig(model=model, workers=workers, engine=engine),
        member=MEMBER,
        control_address="127.0.0.1:1",
        host="127.0.0.1",
    )
    assert args.why_torch == reason
