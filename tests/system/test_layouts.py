"""Matrices beside the law of ``test_family_pairs``: all layouts, bfloat16, real processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    connected_ray,
    make_config,
    serving,
)
from cluster.config.cluster import ClusterConfig
from tests.harness.golden_clusters import check_greedy, colocated_config, float32_config, requests
from tests.reference.goldens import BF16_VARIANTS, NUM_PROMPTS, Golden
from workers.requests.request import SamplingParams

LAYOUTS = [(attention, experts) for attention in (0, 1, 2, 3) for experts in (1, 2, 3, 4)]
"""Numbers of workers; without attention workers the others are colocated."""

AnyGolden = Callable[[str], Golden]


@pytest.mark.slow
@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "variant",
    [
        *("olmoe-norm-gqa-clip", "dots1-groups", "jetmoe-tied"),
        *("qwen3moe-base", "glm4moe-base", "mixtral-base", "minimaxm2-official-like"),
        *("ernie45-official-like", "gptoss-base", "flexolmo-base"),
        *("deepseekv3-base", "deepseekv2-official-like", "glm4lite-official-like"),
        "qwen3next-layers-bias-tied",
    ],
)
def test_float32_tokens_in_every_layout(
    golden: AnyGolden, variant: str, layout: tuple[int, int], num_micro_batches: int
) -> None:
    """Also steps in which some ranks have one row, or none."""
    engine: dict[str, object] = {"num_micro_batches": num_micro_batches}
    attention, experts = layout
    if attention:
        config = float32_config(golden(variant), attention, experts, engine=engine)
    else:
        config = colocated_config(golden(variant), experts, engine=engine)
    with serving(ThreadCluster(config)) as cluster:
        check_greedy(cluster, golden(variant))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        "jetmoe-untied-top3-eps",
        "dots1-swa",
        "qwen3moe-dense-layers",
        "glm4moe-norms-groups",
        "mixtral-window-tied",
        "minimaxm2-official-like",
        "ernie45-layers",
        "deepseekv3-official-like",
        "qwen35moe-official-like",
        "olmoe-norm-gqa-clip",
    ],
)
def test_float32_tokens_of_real_workers(golden: AnyGolden, variant: str) -> None:
    config = float32_config(golden(variant), 1, 2)
    with connected_ray(), serving(RayCluster(config)) as cluster:
        check_greedy(cluster, golden(variant))


def bfloat16_config(golden: Golden, layout: tuple[int, ...], **engine: object) -> ClusterConfig:
    """(attention, expert) workers, or a number of colocated ones."""
    workers = {"mode": "colocated" if len(layout) == 1 else "disaggregated"}
    return make_config(
        golden.path, layout[0], layout[-1], dtype="bfloat16", workers=workers, engine=engine
    )


def logits_of_prompt(cluster: ServingCluster, golden: Golden) -> list[list[float]]:
    """Log-probabilities of all prompt tokens, by prompt."""
    params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
    results = cluster.answers(requests(golden, params))
    scores = []
    for i in range(NUM_PROMPTS):
        found = results[f"p{i}"].outputs[0].prompt_logprobs
        assert found is not None
        scores.append([e.logprob for e in found.entries() if e is not None])
    return scores


def bf16_cases() -> Iterator[Any]:
    """(variant, layout): one variant of each family by default, each in another layout."""
    for i, variant in enumerate(BF16_VARIANTS):
        for j, layout in enumerate([(1, 2), (2,), (2, 3)]):
            marks = () if i == 2 * j else pytest.mark.slow
            words = "x".join(map(str, layout))
            yield pytest.param(variant, layout, marks=marks, id=f"{variant}-{words}")


@pytest.mark.parametrize(("variant", "layout"), list(bf16_cases()))
def test_bfloat16_prompts_score_as_in_transformers(
    golden: AnyGolden, variant: str, layout: tuple[int, ...]
) -> None:
    """Against the bfloat16 golden: median difference of the prompt tokens' logprobs below 0.3."""
    expected = golden(variant)
    config = bfloat16_config(expected, layout)
    with serving(ThreadCluster(config)) as cluster:
        scores = logits_of_prompt(cluster, expected)
    differences = []
    for i, prompt in enumerate(expected.prompts):
        logprobs = torch.log_softmax(expected.tensors[f"p{i}.logits_bf16"], -1)
        for position, score in enumerate(scores[i]):
            token = prompt[position + 1]
            differences.append(abs(score - float(logprobs[position, token])))
    assert statistics.median(differences) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 3), (3,)])
@pytest.mark.parametrize("variant", BF16_VARIANTS)
def test_bfloat16_in_many_workers_is_the_local_engine_up_to_rounding(
    golden: AnyGolden, variant: str, layout: tuple[int, ...]
) -> None:
    """One process against workers, one request at a time: 2 units in the last bit of 8.0."""
    expected = golden(variant)
    config = bfloat16_config(expected, layout, combine_mode="per_slot")
    asked = requests(expected, SamplingParams(max_tokens=8, temperature=0.0, logprobs=0))
    local = LocalEngine(expected.path, dtype="bfloat16")
    with serving(ThreadCluster(config)) as cluster:
        for request in asked:
            (alone,) = local.generate([request.prompt], request.params)
            got = cluster.answers([request])[request.request_id]
            logprobs = [entry.logprob for output in got.outputs for entry in output.logprobs]
            for ours, theirs in zip(logprobs, alone.logprobs, strict=True):
                assert ours == pytest.approx(theirs.logprob, abs=0.0625)
