"""Expert load of a cluster that serves: every row of a committed step counts once, nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.config.cluster import ClusterConfig
from cluster.core.load_profile import LoadProfile
from tests.harness.failing_steps import FailingWorkerGroup, Faults, renew_on_fault
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import Request, SamplingParams

TOP_K, NUM_EXPERTS = 2, 8


def make_requests(count: int = 12) -> list[Request]:
    rng = random.Random(0)
    return [
        Request(
            request_id=f"r{i}",
            prompt=tuple(rng.randint(3, 95) for _ in range(rng.randint(5, 60))),
            params=SamplingParams(
                max_tokens=rng.randint(2, 30), temperature=1.0, seed=i, ignore_eos=True
            ),
        )
        for i in range(count)
    ]


def make_cluster_config(checkpoint: Path) -> ClusterConfig:
    """Uneven ranks, chunks of prompts beside decodes, experts with two copies."""
    return make_config(
        checkpoint,
        2,
        2,
        workers={"num_redundant_experts": 2},
        engine={
            "deterministic": "on",
            "enable_prefix_caching": False,
            "max_num_batched_tokens": 24,
            "max_num_seqs": 16,
            "num_micro_batches": 2,
        },
    )


def serve(checkpoint: Path, fault_rate: float) -> tuple[dict[str, Any], int]:
    """Serve all requests; the load, and how many steps failed."""
    faults = Faults(Checkpoint(checkpoint).family.banks, fault_rate, seed=5)
    cluster = ThreadCluster(make_cluster_config(checkpoint), FailingWorkerGroup(faults))
    with serving(cluster):
        renew_on_fault(cluster, faults)
        faults.is_armed = True
        cluster.answers(make_requests())
        faults.is_armed = False
        return cluster.call("load"), len(faults.steps)


@pytest.fixture(scope="module")
def calm(tiny_checkpoint: Path) -> dict[str, Any]:
    """The load of an undisturbed run."""
    return serve(tiny_checkpoint, 0.0)[0]


def test_every_row_counts_once(calm: dict[str, Any]) -> None:
    """Steps of decodes are padded to the grants, and the exchange is the same for all ranks."""
    requests = make_requests()
    prompt_rows = sum(len(r.prompt) for r in requests)
    decode_rows = sum(r.params.max_tokens - 1 for r in requests)
    assert calm["tokens"] == prompt_rows + decode_rows
    assert [(b["bank"], b["layer"]) for b in calm["banks"]] == [("mlp", 0), ("mlp", 1)]
    for bank in calm["banks"]:
        assert sum(bank["prefill"]) == prompt_rows * TOP_K
        assert sum(bank["decode"]) == decode_rows * TOP_K
        assert [p + d for p, d in zip(bank["prefill"], bank["decode"], strict=True)] == (
            bank["counts"]
        )
        assert sum(map(sum, bank["slots"])) == sum(bank["counts"])
        assert bank["copies"] == [2, 2, 1, 1, 2, 2, 1, 1]
        assert 0 < bank["phases"]["decode"]["achieved"] <= 1


def test_steps_that_fail_and_run_again_count_once(
    calm: dict[str, Any], tiny_checkpoint: Path
) -> None:
    found, num_failed = serve(tiny_checkpoint, 0.3)
    assert num_failed >= 10
    assert found["tokens"] == calm["tokens"]
    for mine, other in zip(found["banks"], calm["banks"], strict=True):
        for what in ("prefill", "decode", "slots"):
            assert mine[what] == other[what], what


@pytest.fixture(scope="module")
def cluster(tiny_checkpoint: Path) -> Iterator[ThreadCluster]:
    with serving(ThreadCluster(make_cluster_config(tiny_checkpoint))) as started:
        assert isinstance(started, ThreadCluster)
        yield started


def test_copies_take_their_shares_and_decodes_one_copy(cluster: ThreadCluster) -> None:
    """Known loads in: each copy's part of an expert's prompt rows is its split weight."""
    rng = random.Random(1)
    requests = [
        Request(
            request_id=f"share{i}",
            prompt=tuple(rng.randint(3, 95) for _ in range(200)),
            params=SamplingParams(max_tokens=8, temperature=1.0, seed=i, ignore_eos=True),
        )
        for i in range(40)
    ]
    before = cluster.call("load")
    cluster.answers(requests)
    after = cluster.call("load")
    placement = cluster.controller.cluster.placement
    for bank, old, new in zip(placement.banks, before["banks"], after["banks"], strict=True):
        decoded, prompts = (
            [b - a for a, b in zip(old[what] or [0] * NUM_EXPERTS, new[what], strict=True)]
            for what in ("decode", "prefill")
        )
        for expert in range(NUM_EXPERTS):
            total = prompts[expert]
            assert total > 100
            for device, slot in bank.logical_to_physical(expert):
                tokens = new["slots"][device][slot]
                tokens -= old["slots"][device][slot] if old["slots"] else 0
                if device == bank.decode_device[expert]:
                    tokens -= decoded[expert]
                share = bank.split[device][slot]
                error = 5 * (share * (1 - share) / total) ** 0.5
                assert tokens / total == pytest.approx(share, abs=error)


def test_reports_come_by_themselves(cluster: ThreadCluster) -> None:
    controller = cluster.controller
    cluster.call("load")
    known = controller.cluster.load.totals().rows
    cluster.answers(make_requests(2))
    cluster.wait(lambda _: controller.cluster.load.totals().rows > known)
    document = cluster.call("load")
    profile = LoadProfile.from_dict(document)
    assert profile.tokens == document["tokens"] > 0
    assert document["model"] == "model"
    assert document["workers"] == ["expert-0", "expert-1"]
