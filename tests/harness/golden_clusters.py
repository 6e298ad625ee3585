"""Clusters that serve a golden checkpoint, and what they must answer."""

from __future__ import annotations

from benchmarks.harness.serving_cluster import ServingCluster, make_config
from cluster.config.cluster import ClusterConfig
from tests.reference.goldens import MAX_MODEL_LEN, NUM_NEW_TOKENS, NUM_PROMPTS, Golden
from workers.requests.request import Request, SamplingParams

GREEDY = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)


def requests(golden: Golden, params: SamplingParams = GREEDY) -> list[Request]:
    """All prompts of a golden."""
    return [
        Request(request_id=f"p{i}", prompt=prompt, params=params)
        for i, prompt in enumerate(golden.prompts)
    ]


def float32_config(
    golden: Golden, attention: int, experts: int, **sections: dict[str, object]
) -> ClusterConfig:
    """With so many workers; of colocated ones there are ``experts``."""
    return make_config(
        golden.path, attention, experts, dtype="float32", max_model_len=MAX_MODEL_LEN, **sections
    )


def colocated_config(
    golden: Golden, num_workers: int, **sections: dict[str, object]
) -> ClusterConfig:
    """Workers that do both."""
    workers = {"mode": "colocated"} | sections.pop("workers", {})
    return float32_config(golden, 0, num_workers, workers=workers, **sections)


def check_greedy(cluster: ServingCluster, golden: Golden) -> None:
    """All tokens are transformers' own, and nothing is left behind."""
    results = cluster.answers(requests(golden))
    for i in range(NUM_PROMPTS):
        assert tuple(results[f"p{i}"].tokens[0]) == golden.greedy(i), f"prompt {i}"
    assert cluster.blocks_in_use() == 0
