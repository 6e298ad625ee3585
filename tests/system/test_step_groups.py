"""Step groups of prefill and decode workers over the same expert workers: tokens of one group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.harness.serving_cluster import ThreadCluster, serving
from cluster.config.cluster import ClusterConfig
from tests.harness.golden_clusters import check_greedy, float32_config, requests
from tests.reference.goldens import Golden

AnyGolden = Callable[[str], Golden]
GROUPS: dict[str, Any] = {
    "num_attention_workers": None,
    "num_prefill_workers": 1,
    "num_decode_workers": 2,
}


def config_of(golden: AnyGolden, variant: str, **workers: Any) -> ClusterConfig:
    return float32_config(golden(variant), 1, 2, workers=GROUPS | workers)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_groups_with_a_step_each_have_the_tokens_of_one_group(
    golden: AnyGolden, kernels: str
) -> None:
    """The requests of all three attention workers run at the same time."""
    config = config_of(golden, "olmoe-norm-gqa-clip", kernels=kernels)
    with serving(ThreadCluster(config)) as cluster:
        groups = {w["name"]: w["group"] for w in cluster.snapshot()["workers"]}
        assert groups == {
            "attention-0": "prefill",
            "attention-1": "decode",
            "attention-2": "decode",
            "expert-0": None,
            "expert-1": None,
        }
        for _ in range(3):
            check_greedy(cluster, golden("olmoe-norm-gqa-clip"))
        assert len(cluster.snapshot()["history"]) == 1, "a worker was lost"


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_each_group_has_expert_workers_of_its_own(golden: AnyGolden, kernels: str) -> None:
    """An expert worker gets rows of its group only; the tokens are those of one group."""
    variant = "olmoe-norm-gqa-clip"
    config = config_of(golden, variant, kernels=kernels, share_experts="no")
    threads = ThreadCluster(config)
    with serving(threads) as cluster:

        def num_rows() -> list[float]:
            roles = (threads.group.workers[f"expert-{rank}"].roles.experts for rank in range(2))
            return [
                sum(float(counts.sum()) for counts in role.servers[0].counters.token_counts)
                for role in roles
                if role is not None
            ]

        groups = {w["name"]: w["group"] for w in cluster.snapshot()["workers"]}
        assert (groups["expert-0"], groups["expert-1"]) == ("prefill", "decode")
        before = num_rows()
        for rank, used in ((0, 0), (1, 1), (2, 1)):
            stream = cluster.stream(rank)
            for i, request in enumerate(requests(golden(variant))):
                own = replace(request, request_id=f"{rank}-{i}")
                stream.send(own)
                tokens = stream.collect([own])[own.request_id].tokens[0]
                assert tuple(tokens) == golden(variant).greedy(i)
            stream.close()
            after = num_rows()
            assert [a > b for a, b in zip(after, before, strict=True)] == [used == 0, used == 1]
            before = after
        check_greedy(cluster, golden(variant))
        assert len(cluster.snapshot()["history"]) == 1, "a worker was lost"


def test_exchanges_of_attention_are_interleaved_too(golden: AnyGolden) -> None:
    with serving(ThreadCluster(config_of(golden, "jetmoe-tied"))) as cluster:
        check_greedy(cluster, golden("jetmoe-tied"))


def test_a_group_runs_steps_while_another_one_has_none(golden: AnyGolden) -> None:
    variant = "olmoe-norm-gqa-clip"
    asked = requests(golden(variant))[:2]
    with serving(ThreadCluster(config_of(golden, variant))) as cluster:
        for rank in range(3):
            stream = cluster.stream(rank)
            own = [replace(request, request_id=f"{rank}-{i}") for i, request in enumerate(asked)]
            for request in own:
                stream.send(request)
            results = stream.collect(own)
            stream.close()
            for i, request in enumerate(own):
                tokens = tuple(results[request.request_id].tokens[0])
                assert tokens == golden(variant).greedy(i)
