"""Random checkpoints whose experts are stored in codes, as public ones are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import random_checkpoint
from benchmarks.random_checkpoint import TINY, RandomModel
from benchmarks.wall_rows import Bench
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.expert_form import kept_banks
from workers.quantization.formats import WeightFormat

FLOAT8 = WeightFormat(codes="e4m3", group=128)
MXFP4 = WeightFormat(codes="e2m1", group=32, scales="e8m0")


@pytest.mark.parametrize(
    ("model", "form"),
    [
        (replace(TINY, family="qwen3_moe", stored="float8"), FLOAT8),
        (replace(TINY, family="gpt_oss", stored="mxfp4"), MXFP4),
    ],
    ids=["float8", "mxfp4"],
)
def test_workers_keep_experts_as_they_are_stored(
    model: RandomModel, form: WeightFormat, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(random_checkpoint.write(model, tmp_path), quantize="auto")
    (exchange,) = checkpoint.family.banks[1].exchanges
    described = kept_banks("auto", model.described(), {})
    assert exchange.form == form == described[1].exchanges[0].form
    bank = checkpoint.family.banks[1]
    matrices = checkpoint.family.expert_matrices(bank, 0, 3, checkpoint.tensors)
    for matrix in matrices[:2]:
        found = checkpoint.read_quantized(matrix, form).dequantized()
        assert found.shape == matrix.shape
        assert torch.equal(found, checkpoint.read_stacked(matrix.parts, torch.float32))
        assert 0.6 < float(found.std()) * matrix.shape[1] ** 0.5 < 1.4  # of plain ones: 1


def test_a_model_in_codes_has_a_folder_of_its_own(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, repeats=1, cores=1, is_tiny=True)
    plain = replace(TINY, family="gpt_oss")
    assert bench.checkpoint(plain) != bench.checkpoint(replace(plain, stored="mxfp4"))
