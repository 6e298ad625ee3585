"""The local engine against transformers on all goldens: float32 exactly, bfloat16 by rule.

With the compiled kernels of each instruction set that this processor has.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness.local_engine import LocalEngine, block_bytes
from cluster.config.cluster import EngineSection
from cluster.config.workers import Kernels
from tests.harness.tiers import quick_rows
from tests.reference.goldens import (
    ALL_VARIANTS,
    BF16_VARIANTS,
    BY_TURNS,
    FIRST_BF16,
    IN_CLUSTERS,
    MAX_MODEL_LEN,
    NUM_PROMPTS,
    RANDOM_VARIANTS,
    Golden,
)
from tests.reference.parity import (
    GREEDY,
    RowRecorder,
    check_bfloat16,
    check_float32,
    record,
    router_kinds,
)
from tests.workers.native.builds import NAMES, library
from workers.requests.inspection import InspectionParams

pytestmark = pytest.mark.heavy

INSTRUCTIONS: tuple[str, ...] = (*NAMES, "torch")
VARIANTS = (*ALL_VARIANTS, *RANDOM_VARIANTS)
TYPICAL = {v for v in ALL_VARIANTS if v.endswith(("official-like", "olmoe-base", "jetmoe-tied"))}
"""One variant of each family."""
COMMON = TYPICAL | {*BY_TURNS} - {*IN_CLUSTERS}
FEW = {"jetmoe-tied", "gptoss-official-like"}


@pytest.mark.parametrize("variant", quick_rows(COMMON, VARIANTS))
def test_float32_equals_golden(golden: Callable[[str], Golden], variant: str) -> None:
    check_golden(golden(variant), "auto")


@pytest.mark.parametrize("variant", quick_rows(FEW, VARIANTS))
def test_float32_of_torch_equals_golden(golden: Callable[[str], Golden], variant: str) -> None:
    check_golden(golden(variant), "torch")


def check_golden(expected: Golden, kernels: Kernels) -> None:
    """Each prompt alone, and all of them in one batch."""
    engine = LocalEngine(
        expected.path, dtype="float32", max_model_len=MAX_MODEL_LEN, kernels=kernels
    )
    check_float32(engine, expected)
    together = engine.generate(expected.prompts, GREEDY)
    for i, result in enumerate(together):
        assert result.token_ids == expected.greedy(i), f"greedy tokens of p{i} in a batch"
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


@pytest.mark.skipif(len(NAMES) < 2, reason="the processor has one instruction set of ours or none")
@pytest.mark.parametrize("variant", quick_rows(TYPICAL, VARIANTS))
def test_float32_is_the_same_on_every_instruction_set(
    golden: Callable[[str], Golden], variant: str
) -> None:
    """To the last bit, so that one of them at its golden is enough."""
    expected = golden(variant)
    section = EngineSection(enable_prefix_caching=False)  # all rows are computed each time
    engine = LocalEngine(
        expected.path, dtype="float32", section=section, max_model_len=MAX_MODEL_LEN
    )
    assert engine.team is not None
    found = []
    for name in NAMES:
        engine.team.use(library(name))
        seen = [record(engine, p, replace(GREEDY, max_tokens=8)) for p in expected.prompts]
        found.append([state for one in seen for state in states(engine, one)])
    for name, others in zip(NAMES[1:], found[1:], strict=True):
        for i, (ours, theirs) in enumerate(zip(found[0], others, strict=True)):
            assert torch.equal(ours, theirs), f"{name}: array {i}"


def states(engine: LocalEngine, seen: RowRecorder) -> list[Tensor]:
    """Hidden states, and what all routers gave."""
    routers = [seen.routers(banks) for banks in router_kinds(engine).values()]
    return [seen.hidden_states, *(array for found in routers for array in found)]


@pytest.mark.slow
@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("num_rows", [7, 33])
@pytest.mark.parametrize("block_size", [1, 5])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_float32_tokens_survive_small_steps_and_few_blocks(
    golden: Callable[[str], Golden],
    variant: str,
    block_size: int,
    num_rows: int,
    num_micro_batches: int,
) -> None:
    expected = golden(variant)
    config = LocalEngine(expected.path, dtype="float32").config
    section = EngineSection(
        block_size_tokens=block_size,
        max_num_seqs=6,
        max_num_batched_tokens=num_rows,
        kv_cache_bytes=170 * block_bytes(config, 1, torch.float32),
    )
    engine = LocalEngine(
        expected.path,
        dtype="float32",
        section=section,
        max_model_len=MAX_MODEL_LEN,
        num_micro_batches=num_micro_batches,
    )
    results = engine.generate(expected.prompts, GREEDY)
    assert [r.token_ids for r in results] == [expected.greedy(i) for i in range(NUM_PROMPTS)]
    assert engine.engine.stats()["num_preemptions_total"] > 0
    engine.engine.check_integrity()


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("variant", quick_rows(FIRST_BF16, BF16_VARIANTS))
def test_bfloat16_is_near_golden(
    golden: Callable[[str], Golden], variant: str, instructions: str
) -> None:
    expected = golden(variant)
    kernels: Kernels = "torch" if instructions == "torch" else "auto"
    engine = LocalEngine(
        expected.path, dtype="bfloat16", max_model_len=MAX_MODEL_LEN, kernels=kernels
    )
    if engine.team is not None:
        engine.team.use(library(instructions))
    check_bfloat16(engine, expected)


@pytest.mark.parametrize("variant", ["olmoe-norm-gqa-clip", "dots1-groups", "jetmoe-tied"])
def test_a_float32_checkpoint_in_bfloat16_is_its_rounded_self(
    golden: Callable[[str], Golden], tmp_path: Path, variant: str
) -> None:
    """Every tensor is rounded, as transformers does it, but for the correction bias."""
    expected = golden(variant)
    tensors: dict[str, Tensor] = {}
    for file in expected.path.glob("model*.safetensors"):
        tensors |= load_file(file)
    rounded = {
        name: tensor if name.endswith("correction_bias") else tensor.bfloat16()
        for name, tensor in tensors.items()
    }
    save_file(rounded, tmp_path / "model.safetensors")
    shutil.copy(expected.path / "config.json", tmp_path)
    wanted = [
        InspectionParams(logits=tuple(range(len(prompt))), router_logits=True)
        for prompt in expected.prompts
    ]
    found = [
        LocalEngine(path, dtype="bfloat16").inspect(expected.prompts, wanted)
        for path in (expected.path, tmp_path)
    ]
    for ours, theirs in zip(*found, strict=True):
        for name, array in ours.items():
            assert torch.equal(array, theirs[name]), name


@pytest.mark.parametrize("variant", quick_rows(FIRST_BF16, BF16_VARIANTS))
def test_bfloat16_together_equals_alone_at_equal_lengths(
    golden: Callable[[str], Golden], variant: str
) -> None:
    expected = golden(variant)
    engine = LocalEngine(expected.path, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
    base = expected.prompt(NUM_PROMPTS - 1)
    prompts = [base[i : i + 24] for i in range(0, 64, 8)]
    alone = [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    together = [result.token_ids for result in engine.generate(prompts, GREEDY)]
    assert together == alone
