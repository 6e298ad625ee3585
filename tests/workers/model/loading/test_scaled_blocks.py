"""Float8 matrices with a scale for each block: their values, and what must be there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.config.model import Quantize
from cluster.core.errors import CheckpointError
from tests.reference.goldens import golden_path
from workers.experts.slots import ExpertSlots
from workers.model.config import TensorPart
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.checkpoint_summary import check_checkpoint
from workers.model.loading.scaled_blocks import as_stored, check_codes, scales_of, unscaled
from workers.quantization.formats import WeightFormat

NAME = "model.layers.0.mlp.experts.0.gate_proj.weight"


def test_each_element_has_the_scale_of_its_block() -> None:
    """By plain loops, with blocks that are cut off at both edges."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(2, 7, 10, generator=generator).to(torch.float8_e4m3fn)
    part = TensorPart(name="x", shape=(2, 7, 10), index=1)
    scales = scales_of(part, (3, 4))
    assert scales == TensorPart(name="x_scale_inv", shape=(2, 3, 3), index=1)
    given = torch.rand(scales.part_shape, generator=generator)
    found = unscaled(stored[1], given, (3, 4))
    for row in range(7):
        for column in range(10):
            expected = stored[1, row, column].float() * given[row // 3, column // 4]
            assert found[row, column] == expected


def test_codes_are_kept_with_short_blocks_at_both_edges() -> None:
    stored = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    found = as_stored(stored, scales, (3, 24), WeightFormat(codes="e4m3", group=24))
    assert found.scales.shape == (7, 2)
    assert found.nbytes == found.format.num_bytes((7, 40))
    assert torch.equal(found.dequantized(), unscaled(stored, scales, (3, 24)))


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    """A checkpoint of one file that a test may change."""
    return Path(shutil.copytree(golden_path("qwen3moe-fp8", "qwen3moe"), tmp_path / "fp8"))


def change_config(path: Path, quantization: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def test_bytes_are_those_on_disk(scaled: Path) -> None:
    summary = check_checkpoint(scaled)
    tensors = load_file(scaled / "model.safetensors")
    assert summary.attention_bytes + summary.expert_bytes == sum(t.nbytes for t in tensors.values())
    part = TensorPart(name=NAME, shape=(32, 64))
    assert Checkpoint(scaled).num_bytes(part) == 32 * 64 + 4 * (32 // 8) * (64 // 16)


def test_a_missing_scale_is_named(scaled: Path) -> None:
    tensors = load_file(scaled / "model.safetensors")
    del tensors[f"{NAME}_scale_inv"]
    save_file(tensors, scaled / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor {NAME}_scale_inv \[4, 4\] is missing"):
        check_checkpoint(scaled)


def test_scales_of_other_blocks_are_refused(scaled: Path) -> None:
    change_config(scaled, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    with pytest.raises(CheckpointError, match=r"_scale_inv has shape .* on disk, the config asks"):
        check_checkpoint(scaled)


def test_float8_without_a_word_in_the_config_is_refused(scaled: Path) -> None:
    change_config(scaled, None)
    with pytest.raises(CheckpointError, match=r"F8_E4M3, which needs .* weight_block_size"):
        check_checkpoint(scaled)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("quantize", ["auto", "none"])
def test_codes_that_are_not_numbers_are_refused(
    scaled: Path, code: int, quantize: Quantize
) -> None:
    """Whether workers keep the codes or not: kernels would compute with 480."""
    tensors = load_file(scaled / "model.safetensors")
    tensors[NAME].view(torch.uint8)[5, 7] = code
    save_file(tensors, scaled / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(scaled, quantize=quantize)
    family = checkpoint.family
    form = family.banks[0].exchanges[0].form
    assert (form is None) == (quantize == "none")
    slots = ExpertSlots(family.banks, 128, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=rf"tensor {NAME} must hold numbers"):
        slots.load_all(checkpoint)


def test_all_other_codes_are_numbers() -> None:
    codes = torch.tensor([c for c in range(256) if c not in (0x7F, 0xFF)], dtype=torch.uint8)
    stored = codes.view(torch.float8_e4m3fn)
    check_codes(stored.view(2, -1), "x")
    assert stored.float().isfinite().all()
