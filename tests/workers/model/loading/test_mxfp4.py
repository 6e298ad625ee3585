"""4-bit floats in blocks of 32: their values, and what must be there; parts of tensors."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.core.errors import CheckpointError
from tests.reference.goldens import golden_path
from workers.model.config import TensorPart
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.checkpoint_summary import check_checkpoint
from workers.model.loading.mxfp4 import decoded, stored_parts

NAME = "model.layers.0.mlp.experts.gate_up_proj"
PART = TensorPart(name=NAME, shape=(8, 128, 64), index=3, is_mxfp4=True)
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def number(code: int, scale: int) -> float:
    """By the specification: a sign, two bits of exponent and one of mantissa, times 2**scale."""
    return (-1.0) ** (code // 8) * MAGNITUDES[code % 8] * 2.0 ** (scale - 127)


def test_each_number_is_that_of_the_specification() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 160, (3, 2), generator=generator, dtype=torch.uint8)
    found = decoded(blocks, scales)
    assert found.dtype == torch.bfloat16
    assert found.shape == (3, 64)
    for row in range(3):
        for column in range(64):
            block, place = divmod(column, 32)
            byte = int(blocks[row, block, place // 2])
            code = byte >> 4 if place % 2 else byte & 15
            assert float(found[row, column]) == number(code, int(scales[row, block]))


def test_all_codes_and_extreme_scales_are_exact() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    for scale in (4, 127, 250):
        found = decoded(blocks, torch.full((1, 16), scale, dtype=torch.uint8)).flatten()
        expected = [number(c, scale) for byte in range(256) for c in (byte & 15, byte >> 4)]
        assert found.double().tolist() == expected


def test_a_block_whose_scale_is_not_a_number_is_not_either() -> None:
    scales = torch.tensor([[127, 255]], dtype=torch.uint8)
    found = decoded(torch.zeros(1, 2, 16, dtype=torch.uint8), scales)
    assert found.isnan().tolist() == [[False] * 32 + [True] * 32]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A checkpoint of one file that a test may change."""
    return Path(shutil.copytree(golden_path("gptoss-official-like", "gptoss"), tmp_path / "fp4"))


def test_rows_of_gate_and_up_alternate(packed: Path) -> None:
    checkpoint, tensors = Checkpoint(packed), load_file(packed / "model.safetensors")
    whole = decoded(tensors[f"{NAME}_blocks"][3], tensors[f"{NAME}_scales"][3])
    halves = [replace(PART, rows=(first, 2)) for first in (0, 1)]
    assert [half.part_shape for half in halves] == [(64, 64), (64, 64)]
    found = checkpoint.read_stacked(halves, torch.bfloat16)
    assert torch.equal(found, torch.cat((whole[0::2], whole[1::2])))
    bias = TensorPart(name=f"{NAME}_bias", shape=(8, 128), index=3, rows=(1, 2))
    expected = tensors[bias.name][3, 1::2]
    assert torch.equal(checkpoint.read_stacked([bias], torch.bfloat16), expected)
    out = torch.empty(64, 1, dtype=torch.bfloat16)
    assert torch.equal(checkpoint.read_stacked([bias], torch.bfloat16, out), expected.unsqueeze(1))


def test_a_transposed_part_is_what_its_rows_are_on_disk() -> None:
    checkpoint = Checkpoint(golden_path("gptoss-base", "gptoss"))
    part = TensorPart(name=NAME, shape=(8, 64, 96), index=2, is_transposed=True, rows=(1, 2))
    assert part.part_shape == (48, 64)
    whole = TensorPart(name=NAME, shape=(8, 64, 96), index=2)
    expected = checkpoint.read_stacked([whole], torch.float32).T[1::2]
    assert torch.equal(checkpoint.read_stacked([part], torch.float32), expected)
    assert torch.equal(checkpoint.borrow([part], torch.float32), expected)
    assert checkpoint.num_bytes(part) == 48 * 64 * 4


def test_bytes_are_those_on_disk(packed: Path) -> None:
    summary = check_checkpoint(packed)
    tensors = load_file(packed / "model.safetensors")
    assert summary.attention_bytes + summary.expert_bytes == sum(t.nbytes for t in tensors.values())
    assert Checkpoint(packed).num_bytes(PART) == 128 * 64 // 2 + 128 * 64 // 32


def test_missing_scales_are_named(packed: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    del tensors[f"{NAME}_scales"]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor {NAME}_scales \[8, 128, 2\] is missing"):
        check_checkpoint(packed)


@pytest.mark.parametrize(
    ("name", "words"), [(f"{NAME}_blocks", "supported are U8"), ("lm_head.weight", "F32, BF16")]
)
def test_numbers_of_another_type_are_refused(packed: Path, name: str, words: str) -> None:
    tensors = load_file(packed / "model.safetensors")
    is_blocks = name.endswith("_blocks")
    tensors[name] = tensors[name].to(torch.int8 if is_blocks else torch.uint8)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        check_checkpoint(packed)


def test_blocks_are_those_of_the_shape_that_is_meant() -> None:
    blocks, scales = stored_parts(PART)
    assert (blocks.name, blocks.shape) == (f"{NAME}_blocks", (8, 128, 2, 16))
    assert (scales.name, scales.shape) == (f"{NAME}_scales", (8, 128, 2))
