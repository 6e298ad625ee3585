"""Random checkpoints whose experts are stored in codes, as public ones are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints import random_checkpoint
from benchmarks.checkpoints.random_checkpoint import TINY, RandomModel
from benchmarks.checkpoints.random_codes import draw_matrix
from benchmarks.memory_wall.rows import Bench
from tests.workers.quantization.random import FORMATS, name_of
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.expert_format import kept_banks
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix

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


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_matrices_of_any_format_have_the_size_of_plain_ones(form: WeightFormat) -> None:
    shape = (64, 768)
    one, other = (draw_matrix(form, shape, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parts, other.parts, strict=True))
    empty = QuantizedMatrix.empty(form, shape)
    for own, part in zip(one.parts, empty.parts, strict=True):
        assert (own.shape, own.dtype) == (part.shape, part.dtype)
    numbers = one.dequantized()
    assert numbers.isfinite().all()
    assert 0.5 < float(numbers.square().mean()) ** 0.5 * shape[1] ** 0.5 < 2.0
    assert abs(float(numbers.mean())) * shape[1] ** 0.5 < 0.2
