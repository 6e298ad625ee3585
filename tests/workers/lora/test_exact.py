"""Bits of a request do not depend on its batch, whether its rows or others' have adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config.cluster import EngineSection, Kernels
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from tests.reference.local_engine import LocalEngine
from tests.workers.lora.folders import random_adapter, target_shapes
from tests.workers.lora.test_merged import load, scores, serve

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
