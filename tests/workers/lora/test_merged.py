"""Rows with adapters against checkpoints with the same adapters in their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints.adapters import (
    RandomAdapter,
    put,
    random_adapter,
    target_shapes,
    write_merged,
)
from benchmarks.harness.local_engine import Generated, LocalEngine, generated
from cluster.config.cluster import EngineSection
from cluster.config.workers import Kernels
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from workers.requests.request import Request, SamplingParams

KERNELS: tuple[Kernels, ...] = ("auto", "torch")
VARIANTS = [
    pytest.param(variant, marks=() if variant == "dots1-groups" else pytest.mark.slow)
    for variant in (
        "dots1-groups",
        "olmoe-norm-gqa-clip",
        "jetmoe-tied",
        "qwen3moe-dense-layers",
        "glm4moe-quarter-tied",
        "mixtral-base",
        "minimaxm2-official-like",
        "gptoss-base",
        "flexolmo-bias-gqa-tied",
        "deepseekv3-base",
        "deepseekv2-lite",
        "qwen3next-base",
        "qwen35moe-base",
        "ernie45-official-like",
    )
]
"""One of each kind of attention and MLP; by default the one with shared experts and dense MLPs."""
SCORES = SamplingParams(max_tokens=12, temperature=0.0, prompt_logprobs=0, logprobs=0)


def serve(
    engine: LocalEngine, prompts: list[tuple[int, ...]], adapters: list[str]
) -> list[Generated]:
    """Requests of one batch, each with its adapter."""
    requests = [
        Request(request_id=f"r{i}", prompt=prompt, params=SCORES, adapter=adapter)
        for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True))
    ]
    outputs = engine.run(requests)
    return [generated(outputs[r.request_id, 0]) for r in requests]


def scores(found: Generated) -> torch.Tensor:
    """Log-probabilities of the prompt, and of what was drawn."""
    assert found.prompt_logprobs is not None
    entries = [e for e in (*found.prompt_logprobs, *found.logprobs) if e is not None]
    return torch.tensor([entry.logprob for entry in entries])


def load(engine: LocalEngine, key: str, adapter: RandomAdapter, folder: Path) -> None:
    adapters = engine.engine.adapters
    put(adapters, key, adapters.read(adapter.write(folder)))


def make(path: Path, kernels: Kernels = "auto", dtype: str = "float32") -> LocalEngine:
    section = EngineSection(max_num_batched_tokens=64)
    return LocalEngine(
        path, dtype=dtype, max_model_len=MAX_MODEL_LEN, kernels=kernels, section=section
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_merged_weights(
    golden: Callable[[str], Golden], variant: str, kernels: Kernels, tmp_path: Path
) -> None:
    expected = golden(variant)
    shapes = target_shapes(expected.path)
    adapters = {
        "a": random_adapter(shapes, 1),
        "b": random_adapter(shapes, 2, rank=3, use_rslora=True),
    }
    engine = make(expected.path, kernels)
    prompts = [tuple(prompt) for prompt in expected.prompts[1:7]]
    plain = serve(engine, prompts, [""] * 6)
    for key, adapter in adapters.items():
        load(engine, key, adapter, tmp_path / key)
    found = serve(engine, prompts, ["", "a", "b", "a", "", "b"])
    for key, adapter in adapters.items():
        merged = make(write_merged(expected.path, adapter, tmp_path / f"{key}-merged"), kernels)
        for place in range(6):
            if ["", "a", "b", "a", "", "b"][place] != key:
                continue
            (reference,) = serve(merged, [prompts[place]], [""])
            assert found[place].token_ids == reference.token_ids
            torch.testing.assert_close(
                scores(found[place]), scores(reference), rtol=1e-3, atol=2e-3
            )
            length = len(prompts[place]) - 1
            before, after = scores(plain[place])[:length], scores(found[place])[:length]
            assert not torch.allclose(before, after, atol=0.05), "the adapter changes something"
    for place in (0, 4):
        assert found[place].token_ids == plain[place].token_ids
    engine.engine.check_integrity()


@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16_is_as_near_as_merged_weights_are(
    golden: Callable[[str], Golden], kernels: Kernels, tmp_path: Path
) -> None:
    """To float32 with merged weights: both round, each in its way."""
    expected = golden("dots1-groups")
    adapter = random_adapter(target_shapes(expected.path), 1)
    merged = write_merged(expected.path, adapter, tmp_path / "merged")
    prompts = [tuple(prompt) for prompt in expected.prompts[1:7]]
    engine = make(expected.path, kernels, "bfloat16")
    load(engine, "a", adapter, tmp_path / "a")

    def prompt_scores(served: LocalEngine, key: str) -> torch.Tensor:
        found = serve(served, prompts, [key] * 6)
        pairs = zip(found, prompts, strict=True)
        return torch.cat([scores(own)[: len(prompt) - 1] for own, prompt in pairs])

    exact = prompt_scores(make(merged, kernels), "")
    adapted = (prompt_scores(engine, "a") - exact).abs().median()
    rounded = (prompt_scores(make(merged, kernels, "bfloat16"), "") - exact).abs().median()
    assert adapted < 1.5 * rounded + 0.01, f"{adapted} and {rounded}"
