"""The engine with the kernels of GPUs: what transformers says, token by token.

Without a GPU, Triton's interpreter runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from tests.workers.cuda.device import DEVICE
from workers.dispatch.local import LocalDispatcher
from workers.experts.bank import ExpertBank
from workers.experts.kernels_cuda import CudaExperts
from workers.experts.slots import ExpertSlots
from workers.model.cuda.blocks import CudaBlocks
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.config_file import resolve_dtype
from workers.requests.request import SamplingParams

GPU_VARIANTS = ("dots1-groups", "jetmoe-tied", "gptoss-base", "flexolmo-base", "qwen3next-base")
SECTION = EngineSection(max_num_batched_tokens=16, max_num_seqs=8, block_size_tokens=4)
"""Prompts are cut into chunks, which attend to keys of earlier ones."""


def gpu_engine(path: Path, section: EngineSection) -> LocalEngine:
    """An engine on a GPU; without one, on the CPU with the parts that it has on a GPU."""
    if DEVICE.type == "cuda":
        return LocalEngine(path, section=section, max_model_len=MAX_MODEL_LEN, device="cuda")
    checkpoint = Checkpoint(path)
    family = checkpoint.family
    dtype = resolve_dtype("auto", family.config)
    num_slots = max(bank.num_experts for bank in family.banks)
    slots = ExpertSlots(family.banks, num_slots, dtype, DEVICE)
    slots.banks = tuple(
        ExpertBank(spec, num_slots, dtype, DEVICE, CudaExperts) for spec in family.banks
    )
    slots.load_all(checkpoint)
    local = LocalEngine(
        path,
        section=section,
        max_model_len=MAX_MODEL_LEN,
        kernels="torch",
        wrap=lambda _: LocalDispatcher(slots.banks, family.banks),
    )
    runner = local.engine.runner
    runner.model = family.attention_model(checkpoint, dtype, DEVICE, MAX_MODEL_LEN, CudaBlocks())
    runner.cache.is_read_in_place = runner.cache.has_heads  # as on a GPU
    return local


@pytest.mark.parametrize(
    ("variant", "num_tokens"),
    [
        ("olmoe-norm-gqa-clip", 2),
        pytest.param("deepseekv3-base", 2, marks=pytest.mark.slow),
        *(pytest.param(x, 8, marks=pytest.mark.slow) for x in GPU_VARIANTS),
    ],
)
def test_greedy_tokens_are_those_of_transformers(
    golden: Callable[[str], Golden], variant: str, num_tokens: int
) -> None:
    """Of two prompts at once; then of one whose blocks are known."""
    expected = golden(variant)
    engine = gpu_engine(expected.path, SECTION)
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    for numbers in ([0, 1], [1]):
        results = engine.generate([expected.prompts[i] for i in numbers], params)
        for i, result in zip(numbers, results, strict=True):
            assert result.token_ids == expected.greedy(i)[:num_tokens]
