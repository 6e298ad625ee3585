"""The engine with keys and values in fp8: more blocks, answers near those of bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from cluster.config.cluster import EngineSection, Kernels
from tests.reference.exact import exact
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from tests.reference.local_engine import LocalEngine
from tests.reference.parity import check_bfloat16, record
from tests.workers.kv.transfer.test_store import NUM_BLOCKS, PROMPT, copy, request_of, serve
from workers.requests.inspection import Inspection
from workers.requests.request import Request, SamplingParams

FAMILIES = ["olmoe-norm-gqa-clip", "dots1-groups", "jetmoe-tied"]
KERNELS: tuple[Kernels, ...] = ("auto", "torch")
FP8 = EngineSection(kv_cache_dtype="fp8")
ONE = SamplingParams(max_tokens=1, temperature=0.0)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_bfloat16_is_near_golden(
    golden: Callable[[str], Golden], variant: str, kernels: Kernels
) -> None:
    """Within the limits of a bfloat16 cache."""
    expected = golden(variant)
    engine = LocalEngine(
        expected.path, dtype="bfloat16", section=FP8, max_model_len=MAX_MODEL_LEN, kernels=kernels
    )
    assert engine.engine.cache.dtype == torch.uint8
    check_bfloat16(engine, expected)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_float32_hidden_states_are_off_by_the_rounding_of_keys_and_values(
    golden: Callable[[str], Golden], variant: str, kernels: Kernels
) -> None:
    expected = golden(variant)
    engine = LocalEngine(
        expected.path, dtype="float32", section=FP8, max_model_len=MAX_MODEL_LEN, kernels=kernels
    )
    for i, prompt in enumerate(expected.prompts):
        seen = record(engine, prompt, ONE).hidden_states[1, : len(prompt)]
        wanted = expected.tensors[f"p{i}.hidden_states"][1]
        off = (seen - wanted).abs().median() / wanted.abs().median()
        assert 1e-5 < off < 0.05, "of the first layer: codes have 4 significant bits"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_counted_in_bytes_that_are_taken(tiny_checkpoint: Path, dtype: str) -> None:
    engines = [
        LocalEngine(
            tiny_checkpoint,
            dtype=dtype,
            section=EngineSection(kv_cache_dtype=kind, kv_cache_bytes=1 << 20),
            max_model_len=128,
        )
        for kind in ("auto", "fp8")
    ]
    sizes = []
    for engine in engines:
        cache, pool = engine.engine.cache, engine.engine.pool
        each = sum(layer.nbytes for layer in cache.layers) // (pool.num_blocks + 1)
        assert pool.num_blocks == (1 << 20) // each
        sizes.append(each)
    itemsize, head_dim = (4 if dtype == "float32" else 2), engines[0].config.head_dim
    assert sizes[0] * (head_dim + 1) == sizes[1] * head_dim * itemsize


@pytest.mark.parametrize("is_torch_exact", [False, True], ids=["native", "torch deterministic"])
@pytest.mark.parametrize("variant", ["olmoe-base", *FAMILIES[1:]])
def test_bits_depend_neither_on_the_batch_nor_on_a_prefix_hit_nor_on_a_copy(
    golden: Callable[[str], Golden], variant: str, is_torch_exact: bool
) -> None:
    section = EngineSection(kv_cache_dtype="fp8", deterministic=True)
    kernels: Kernels = "torch" if is_torch_exact else "auto"
    alone, other = (
        LocalEngine(
            golden(variant).path,
            dtype="bfloat16",
            section=section,
            max_model_len=128,
            kernels=kernels,
        )
        for _ in range(2)
    )
    outputs = serve(alone, request_of())
    expected = exact(outputs)
    again = serve(alone, request_of())
    assert again[0].num_cached_tokens == NUM_BLOCKS * 16
    assert exact(again) == expected
    assert copy(alone, other, request_of()) == NUM_BLOCKS
    copied = serve(other, request_of())
    assert copied[0].num_cached_tokens == NUM_BLOCKS * 16
    assert exact(copied) == expected
    batch = [request_of(), *(_other_request(i) for i in range(3))]
    fresh = [replace(request, cache_salt="fresh") for request in batch]  # nothing is cached
    together = alone.run(fresh)
    assert exact(together[fresh[0].request_id, 0]) == expected


def _other_request(number: int) -> Request:
    return request_of(f"other {number}", prompt=PROMPT[number : 20 + 9 * number])


@pytest.mark.parametrize("kernels", KERNELS)
def test_attention_maps_are_those_of_the_keys_that_are_kept(
    tiny_checkpoint: Path, kernels: Kernels
) -> None:
    wanted = Inspection(attentions=True)
    found = [
        LocalEngine(
            tiny_checkpoint, dtype="float32", section=section, max_model_len=128, kernels=kernels
        ).inspect([PROMPT[:40]], wanted)[0]
        for section in (EngineSection(), FP8)
    ]
    off = (found[1]["attentions"] - found[0]["attentions"]).abs()
    assert 0 < off.max() < 0.05
