"""A step that fails anywhere runs again, and no token and no bit differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.harness.cluster_gateway import Answer, gateway_of
from benchmarks.harness.mesh import make_header
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.config.cluster import ClusterConfig
from cluster.launch.model_source import bundled_checkpoint
from gateway.core.call import GenerateCall
from tests.harness.failing_steps import FailingWorkerGroup, Faults, renew_on_fault
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import FinishReason


def make_config_of(
    mode: str = "disaggregated",
    transport: str = "sockets",
    dtype: str = "float32",
    **engine: object,
) -> ClusterConfig:
    """2 x 2 workers; copies of experts, so that prompt rows have a choice."""
    return make_config(
        bundled_checkpoint(),
        2,
        2,
        dtype=dtype,
        workers={"num_redundant_experts": 8, "mode": mode},
        engine={
            "deterministic": "on",
            "kv_cache_bytes": 64 << 20,
            "max_num_batched_tokens": 64,
            **engine,
        },
        transport={"transport": transport},
    )


@dataclass(frozen=True, slots=True)
class Run:
    """What came of all calls."""

    answers: list[Answer]
    num_preemptions: float


def serve(config: ClusterConfig, asked: Sequence[GenerateCall], faults: Faults) -> Run:
    """Serve all calls; from the moment that every one is handed over steps fail."""
    cluster = ThreadCluster(config, FailingWorkerGroup(faults))

    def begun() -> None:
        faults.is_armed = True

    with serving(cluster):
        renew_on_fault(cluster, faults)
        with gateway_of(cluster) as gateway:
            answers = gateway.answer(asked, begun)
        faults.is_armed = False
        assert cluster.blocks_in_use() == 0
        assert cluster.group.deaths == []
        stats = [worker["stats"] for worker in cluster.snapshot(fresh=True)["workers"]]
    return Run(answers, sum(s.get("num_preemptions_total", 0.0) for s in stats))


def make_faults(rate: float) -> Faults:
    return Faults(Checkpoint(bundled_checkpoint()).family.banks, rate, seed=3)


def check_retries(config: ClusterConfig, asked: Sequence[GenerateCall], num_steps: int) -> Run:
    """With at least ``num_steps`` failed steps every answer is the undisturbed one."""
    expected = serve(config, asked, make_faults(0.0))
    failing = make_faults(0.25)
    found = serve(config, asked, failing)
    assert len(failing.steps) >= num_steps
    for i, (mine, other) in enumerate(zip(found.answers, expected.answers, strict=True)):
        assert mine == other, f"call {i}"
        assert mine.num_tokens >= (asked[i].min_tokens or 0)
        assert all(token.logprob is not None for token in mine.tokens)
    assert {a.reason for a in found.answers} == {FinishReason.STOP, FinishReason.LENGTH}
    return found


@pytest.mark.parametrize(
    ("num_calls", "num_tokens", "num_steps"),
    [(8, 50, 6), pytest.param(24, 200, 50, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_failed_steps_leave_no_trace(num_calls: int, num_tokens: int, num_steps: int) -> None:
    asked = make_calls(num_calls, num_tokens)
    check_retries(make_config_of(num_micro_batches=2), asked, num_steps)


VARIANTS: dict[str, dict[str, Any]] = {
    "one micro-batch": {"num_micro_batches": 1, "dtype": "bfloat16"},
    "collective": {"transport": "collective"},
    "colocated": {"mode": "colocated", "num_micro_batches": 2},
    "no prefix cache": {"enable_prefix_caching": False},
    "preemption": {"kv_cache_bytes": 2_000_000},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_failed_steps_leave_no_trace_in_other_clusters(name: str) -> None:
    found = check_retries(make_config_of(**VARIANTS[name]), make_calls(8, 100), 20)
    assert (found.num_preemptions > 0) is (name == "preemption")


def test_faults_are_everywhere() -> None:
    """The plan of faults reaches every worker, bank, micro-batch and side of a call."""
    faults = make_faults(1.0)
    faults.is_armed = True
    workers = ("attention-0", "expert-0")
    header = make_header((8, 8), num_micro_batches=2)
    found = {faults.of(replace(header, step=step), workers) for step in range(4000)}
    assert len(found) == 2 * len(Checkpoint(bundled_checkpoint()).family.banks) * 2 * 2 * 2
    faults.is_armed = False
    assert faults.of(header, workers) is None
