"""Every golden through attention and expert workers: all layouts, both transports, both modes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from cluster.config.cluster import ClusterConfig
from tests.harness.local_engine import LocalEngine
from tests.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    connected_ray,
    make_config,
    serving,
)
from tests.reference.goldens import (
    BF16_VARIANTS,
    MAX_MODEL_LEN,
    NUM_NEW_TOKENS,
    NUM_PROMPTS,
    OLMOE_VARIANTS,
    OTHER_VARIANTS,
    Golden,
)
from workers.requests.request import Request, SamplingParams

LAYOUTS = [(attention, experts) for attention in (1, 2, 3) for experts in (1, 2, 3, 4)]
DEFAULT_VARIANTS = ("olmoe-base", "olmoe-norm-gqa-clip", "olmoe-bias-tied-mqa")
"""They share the layouts by default: many experts, few of them, one kv head."""
FAMILY_LAYOUTS = [(1, 1), (1, 3), (2, 2), (3, 4)]
"""For the variants of all other families; each runs in one of them by default."""
GREEDY = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)

AnyGolden = Callable[[str], Golden]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected_ray():
        yield


def bf16_cases(layouts: Sequence[tuple[int, ...]]) -> Iterator[Any]:
    """(variant, layout), all but one of a variant marked slow."""
    for i, variant in enumerate(BF16_VARIANTS):
        for j, layout in enumerate(layouts):
            marks = () if i % len(layouts) == j else pytest.mark.slow
            words = "x".join(map(str, layout))
            yield pytest.param(variant, layout, marks=marks, id=f"{variant}-{words}")


def olmoe_cases(layouts: Sequence[Any]) -> Iterator[Any]:
    """(variant, layout), where all but one of a layout are marked slow."""
    for variant in OLMOE_VARIANTS:
        for i, layout in enumerate(layouts):
            is_default = variant == DEFAULT_VARIANTS[i % len(DEFAULT_VARIANTS)]
            marks = () if is_default else pytest.mark.slow
            words = layout if isinstance(layout, int) else "x".join(map(str, layout))
            yield pytest.param(variant, layout, marks=marks, id=f"{variant}-{words}")


def family_cases() -> Iterator[Any]:
    """(variant, attention workers, expert workers), all but one of a variant marked slow."""
    for i, variant in enumerate(OTHER_VARIANTS):
        for j, layout in enumerate(FAMILY_LAYOUTS):
            is_default = i % len(FAMILY_LAYOUTS) == j
            marks = () if is_default else pytest.mark.slow
            yield pytest.param(variant, *layout, marks=marks)


def requests(golden: Golden, params: SamplingParams = GREEDY) -> list[Request]:
    """All prompts of a golden."""
    return [
        Request(request_id=f"p{i}", prompt=prompt, params=params)
        for i, prompt in enumerate(golden.prompts)
    ]


def float32_config(
    golden: Golden, attention: int, experts: int, **sections: dict[str, object]
) -> ClusterConfig:
    return make_config(
        golden.path, attention, experts, dtype="float32", max_model_len=MAX_MODEL_LEN, **sections
    )


def colocated_config(
    golden: Golden, num_workers: int, **sections: dict[str, object]
) -> ClusterConfig:
    workers = {"mode": "colocated"} | sections.pop("workers", {})
    return float32_config(golden, 0, num_workers, workers=workers, **sections)


def bfloat16_config(golden: Golden, layout: tuple[int, ...], **engine: object) -> ClusterConfig:
    """(attention, expert) workers, or a number of colocated ones."""
    workers = {"mode": "colocated" if len(layout) == 1 else "disaggregated"}
    return make_config(
        golden.path, layout[0], layout[-1], dtype="bfloat16", workers=workers, engine=engine
    )


def check_greedy(cluster: ServingCluster, golden: Golden) -> None:
    """All tokens are transformers' own, and nothing is left behind."""
    results = cluster.answers(requests(golden))
    for i in range(NUM_PROMPTS):
        assert tuple(results[f"p{i}"].tokens[0]) == golden.greedy(i), f"prompt {i}"
    assert cluster.blocks_in_use() == 0


@pytest.mark.parametrize(("variant", "attention", "experts"), list(family_cases()))
def test_float32_tokens_of_all_families(
    golden: AnyGolden, variant: str, attention: int, experts: int
) -> None:
    config = float32_config(golden(variant), attention, experts)
    with serving(ThreadCluster(config)) as cluster:
        check_greedy(cluster, golden(variant))


@pytest.mark.parametrize(("variant", "layout"), list(olmoe_cases(LAYOUTS)))
def test_float32_tokens_in_every_layout(
    golden: AnyGolden, variant: str, layout: tuple[int, int]
) -> None:
    config = float32_config(golden(variant), *layout)
    with serving(ThreadCluster(config)) as cluster:
        check_greedy(cluster, golden(variant))


@pytest.mark.parametrize(("variant", "num_workers"), list(olmoe_cases([1, 2, 3, 4])))
def test_float32_tokens_of_colocated_workers(
    golden: AnyGolden, variant: str, num_workers: int
) -> None:
    config = colocated_config(golden(variant), num_workers)
    with serving(ThreadCluster(config)) as cluster:
        check_greedy(cluster, golden(variant))


@pytest.mark.ray
@pytest.mark.parametrize(
    "variant",
    [
        "olmoe-base",
        "dots1-swa",
        "jetmoe-untied-top3-eps",
        *(pytest.param(v, marks=pytest.mark.slow) for v in OLMOE_VARIANTS if v != "olmoe-base"),
    ],
)
def test_float32_tokens_of_real_workers(local_ray: None, golden: AnyGolden, variant: str) -> None:
    with serving(RayCluster(float32_config(golden(variant), 1, 2))) as cluster:
        check_greedy(cluster, golden(variant))


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
@pytest.mark.parametrize("combine_mode", ["sum", "per_slot"])
@pytest.mark.parametrize("transport", ["sockets", "collective"])
def test_transports_and_combine_modes_give_the_same_tokens(
    golden: AnyGolden, transport: str, combine_mode: str, mode: str
) -> None:
    config = float32_config(
        golden("olmoe-base"),
        2,
        2,
        engine={"combine_mode": combine_mode},
        transport={"transport": transport},
        workers={"mode": mode, "num_redundant_experts": 8},
    )
    with serving(ThreadCluster(config)) as cluster:
        check_greedy(cluster, golden("olmoe-base"))


@pytest.mark.parametrize("variant", ["olmoe-base", "dots1-swa", "jetmoe-legacy-config"])
def test_local_mode_is_served_by_one_worker(golden: AnyGolden, variant: str) -> None:
    config = float32_config(golden(variant), 1, 0, workers={"mode": "local"})
    with serving(ThreadCluster(config)) as cluster:
        check_greedy(cluster, golden(variant))


def logits_of_prompt(cluster: ServingCluster, golden: Golden) -> list[list[float]]:
    """Log-probabilities of all prompt tokens, by prompt."""
    params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
    results = cluster.answers(requests(golden, params))
    scores = []
    for i in range(NUM_PROMPTS):
        entries = results[f"p{i}"].outputs[0].prompt_logprobs
        assert entries is not None
        scores.append([e.logprob for e in entries if e is not None])
    return scores


@pytest.mark.parametrize(("variant", "layout"), list(bf16_cases([(1, 2), (2, 3), (2,)])))
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


@pytest.mark.parametrize(("variant", "layout"), list(bf16_cases([(1, 3), (3,)])))
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


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_requests_together_equal_requests_alone(golden: AnyGolden, mode: str) -> None:
    expected = golden("olmoe-base")
    params = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
    asked = requests(expected, params)
    engine: dict[str, object] = {"deterministic": True}
    config = float32_config(expected, 2, 2, workers={"mode": mode}, engine=engine)
    with serving(ThreadCluster(config)) as cluster:
        together = cluster.answers(asked)
        for request in asked:
            alone = cluster.answers([request])[request.request_id]
            assert alone.tokens == together[request.request_id].tokens
