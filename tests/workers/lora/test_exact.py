"""Bits of a request do not depend on its batch, whether its rows or others' have adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.checkpoints.adapters import random_adapter, target_shapes
from benchmarks.harness.local_engine import Generated, LocalEngine
from cluster.config.cluster import EngineSection
from cluster.config.speculation import SpeculationSection
from cluster.config.workers import Kernels
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from tests.workers.lora.test_merged import load, scores, serve
from workers.speculation.acceptance import Acceptance

NGRAM = SpeculationSection(speculative_method="ngram", ngram_min=1, ngram_max=3)
KEYS = ["", "a", "b", "a", "", "b"]
CASES = [
    pytest.param("dots1-groups", "auto", "float32"),
    pytest.param("dots1-groups", "auto", "bfloat16"),
    pytest.param("dots1-groups", "torch", "float32", marks=pytest.mark.slow),
    pytest.param("olmoe-norm-gqa-clip", "auto", "bfloat16", marks=pytest.mark.slow),
    pytest.param("jetmoe-tied", "auto", "float32", marks=pytest.mark.slow),
    pytest.param("gptoss-base", "auto", "bfloat16", marks=pytest.mark.slow),
    pytest.param("deepseekv3-base", "auto", "float32", marks=pytest.mark.slow),
    pytest.param("deepseekv3-base", "torch", "float32", marks=pytest.mark.slow),
    pytest.param("qwen3next-base", "auto", "float32", marks=pytest.mark.slow),
    pytest.param("flexolmo-base", "auto", "bfloat16", marks=pytest.mark.slow),
]


def test_nor_on_drafts_where_weights_are_quantized(
    golden: Callable[[str], Golden], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters are not quantized, and drafts are verified with them."""
    monkeypatch.setattr(Acceptance, "num_worthwhile", lambda self, price, most: most)
    checkpoint = golden("dots1-groups")
    prompts = [tuple(prompt) * 2 for prompt in checkpoint.prompts[1:7]]
    adapter = random_adapter(target_shapes(checkpoint.path), 1)

    def answers(speculation: SpeculationSection | None) -> tuple[list[Generated], float]:
        engine = LocalEngine(
            checkpoint.path,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            quantize="int4",
            quantize_layers="all",
            speculation=speculation,
            section=EngineSection(deterministic="on"),
        )
        for key in ("a", "b"):
            load(engine, key, adapter, tmp_path / key)
        found = serve(engine, prompts, KEYS)
        return found, engine.engine.stats().get("spec_decode_num_draft_tokens_total", 0.0)

    (alone, _), (found, num_drafted) = answers(None), answers(NGRAM)
    assert num_drafted > 0
    assert [f.token_ids for f in found] == [a.token_ids for a in alone]
    for own, expected in zip(found, alone, strict=True):
        assert scores(own).equal(scores(expected))


@pytest.mark.parametrize(("variant", "kernels", "dtype"), CASES)
def test_bits_depend_on_the_request_alone(
    golden: Callable[[str], Golden], variant: str, kernels: Kernels, dtype: str, tmp_path: Path
) -> None:
    checkpoint = golden(variant)
    prompts = [tuple(prompt) for prompt in checkpoint.prompts[1:7]]
    shapes = target_shapes(checkpoint.path)
    some = {name: shape for name, shape in shapes.items() if "q_proj" in name or "up_proj" in name}

    def make(num_rows: int, num_micro_batches: int) -> LocalEngine:
        engine = LocalEngine(
            checkpoint.path,
            dtype=dtype,
            max_model_len=MAX_MODEL_LEN,
            kernels=kernels,
            num_micro_batches=num_micro_batches,
            section=EngineSection(
                max_num_batched_tokens=num_rows, max_num_seqs=6, deterministic="on"
            ),
        )
        load(engine, "a", random_adapter(shapes, 1), tmp_path / "a")
        load(engine, "b", random_adapter(some or shapes, 2, rank=7), tmp_path / "b")
        return engine

    alone_engine = make(256, 1)
    alone = [serve(alone_engine, [p], [k])[0] for p, k in zip(prompts, KEYS, strict=True)]
    for num_rows, num_micro_batches in ((256, 1), (11, 1), (64, 2)):
        found = serve(make(num_rows, num_micro_batches), prompts, KEYS)
        assert [f.token_ids for f in found] == [a.token_ids for a in alone]
        for own, expected in zip(found, alone, strict=True):
            assert scores(own).equal(scores(expected))
