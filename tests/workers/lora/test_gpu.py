"""Adapters with the parts of a model on a GPU. Without a GPU, Triton's interpreter runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints.adapters import put, random_adapter, target_shapes, write_merged
from cluster.config.cluster import EngineSection
from tests.reference.goldens import Golden
from tests.workers.cuda.device import DEVICE
from tests.workers.engine.test_engine_cuda import gpu_engine
from tests.workers.lora.test_merged import scores, serve

SECTION = EngineSection(max_num_batched_tokens=16, max_num_seqs=8, block_size_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dots1-groups", "jetmoe-tied", "deepseekv3-base"])
def test_equals_merged_weights(
    golden: Callable[[str], Golden], variant: str, tmp_path: Path
) -> None:
    path = golden(variant).path
    adapter = random_adapter(target_shapes(path), 1)
    engine = gpu_engine(path, SECTION)
    adapters = engine.engine.adapters
    if DEVICE.type != "cuda":  # its model was replaced
        adapters._model = engine.engine.runner.model
    put(adapters, "a", adapters.read(adapter.write(tmp_path / "a")))
    prompts = [tuple(golden(variant).prompts[place]) for place in (1, 2, 3)]
    found = serve(engine, prompts, ["a", "", "a"])
    merged = gpu_engine(write_merged(path, adapter, tmp_path / "merged"), SECTION)
    for place, reference in ((0, merged), (1, gpu_engine(path, SECTION)), (2, merged)):
        (expected,) = serve(reference, [prompts[place]], [""])
        assert found[place].token_ids == expected.token_ids
        torch.testing.assert_close(scores(found[place]), scores(expected), rtol=1e-3, atol=2e-3)
