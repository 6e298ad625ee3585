"""Files of llama.cpp: their tensors, and numbers in blocks, read back by plain loops."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.checkpoints import gguf, random_checkpoint
from benchmarks.checkpoints.ggml_types import BF16, F32, Q4_0, Q8_0, GgmlType
from benchmarks.checkpoints.random_checkpoint import TINY


def _scale(block: bytes) -> float:
    return float(struct.unpack_from("<e", block)[0])


def _q8_0_numbers(block: bytes) -> list[float]:
    return [_scale(block) * code for code in struct.unpack_from("<32b", block, 2)]


def _q4_0_numbers(block: bytes) -> list[float]:
    codes = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [_scale(block) * (code - 8) for code in codes]


def _bf16_numbers(block: bytes) -> list[float]:
    return torch.frombuffer(bytearray(block), dtype=torch.bfloat16).tolist()


def _name(value: object) -> str:
    return value.name if isinstance(value, GgmlType) else ""


Read = Callable[[bytes], list[float]]
TYPES = [(Q8_0, _q8_0_numbers), (Q4_0, _q4_0_numbers)]
"""With the numbers of a block, by the layouts of ``ggml-common.h``."""


def _numbers(kind: GgmlType, read: Read, data: bytes) -> list[float]:
    step = kind.block_bytes
    return [x for first in range(0, len(data), step) for x in read(data[first : first + step])]


@pytest.mark.parametrize(("kind", "read"), TYPES, ids=_name)
def test_blocks_stand_for_the_nearest_numbers(kind: GgmlType, read: Read) -> None:
    """Of 4 bits, a number of nearly the largest size and the other sign is a whole scale off."""
    given = torch.randn(3, 2, 96, generator=torch.Generator().manual_seed(0))
    found = bytes(kind.encode(given).flatten().tolist())
    assert len(found) == kind.num_bytes((3, 2, 96)) == 3 * 2 * 3 * kind.block_bytes
    numbers = torch.tensor(_numbers(kind, read, found)).view(3, 2, 96)
    scales = torch.tensor(
        [_scale(found[first:]) for first in range(0, len(found), kind.block_bytes)]
    )
    off = (numbers - given).view(3, 2, 3, 32).abs() / scales.abs().view(3, 2, 3, 1)
    assert float(off.max()) <= (0.51 if kind is Q8_0 else 1.01)
    assert float(off.mean()) < 0.27


@pytest.mark.parametrize(
    ("kind", "scale", "codes"),
    [
        (Q8_0, 4 / 127, [64, 129, 127, *[0] * 28, 32]),
        (Q4_0, 0.5, [0x8C, 0x80, 0x8F, *[0x88] * 12, 0xA8]),
    ],
    ids=["Q8_0", "Q4_0"],
)
def test_codes_are_those_of_the_reference(kind: GgmlType, scale: float, codes: list[int]) -> None:
    """Worked out by hand. Of 4 bits, 0 is 8, -4 is 0, and 4, which would be 16, is 15."""
    given = torch.zeros(32)
    given[:3], given[31] = torch.tensor([2.0, -4.0, 4.0]), 1.0
    found = bytes(kind.encode(given).tolist())
    assert list(found[2:]) == codes
    assert _scale(found) == pytest.approx(scale, rel=1e-3)


@pytest.mark.parametrize(("kind", "read"), TYPES, ids=_name)
def test_a_block_of_zeros_stays_one(kind: GgmlType, read: Read) -> None:
    found = bytes(kind.encode(torch.zeros(32)).tolist())
    assert read(found) == [0.0] * 32


@dataclass(frozen=True, slots=True)
class _Tensor:
    dims: tuple[int, ...]
    code: int
    offset: int


def _text(data: bytes, offset: int) -> tuple[str, int]:
    """A string of a file, and where it ends."""
    (length,) = struct.unpack_from("<Q", data, offset)
    end = offset + 8 + length
    return data[offset + 8 : end].decode(), end


def _tensors(data: bytes, count: int) -> tuple[dict[str, _Tensor], int]:
    """By name, and where their data begins."""
    place = data.index(b"token_embd.weight") - 8  # the first tensor after the fields
    tensors = {}
    for _ in range(count):
        name, place = _text(data, place)
        (rank,) = struct.unpack_from("<I", data, place)
        dims = struct.unpack_from(f"<{rank}Q", data, place + 4)
        tensors[name] = _Tensor(dims, *struct.unpack_from("<IQ", data, place + 4 + 8 * rank))
        place += 4 + 8 * rank + 12
    return tensors, place + -place % 32


@pytest.mark.parametrize(("kind", "read"), [(BF16, _bf16_numbers), *TYPES], ids=_name)
def test_a_gguf_file_has_the_tensors_of_the_checkpoint(
    kind: GgmlType, read: Read, tmp_path: Path
) -> None:
    checkpoint = random_checkpoint.write(TINY, tmp_path / "checkpoint")
    data = gguf.write(TINY, checkpoint, tmp_path / "model.gguf", kind).read_bytes()
    magic, version, num_tensors, num_fields = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)
    assert num_tensors == 3 + TINY.layers * (9 + 3)
    assert _text(data, 24)[0] == "general.architecture"
    assert num_fields > 10

    tensors, start = _tensors(data, num_tensors)
    down = tensors["blk.1.ffn_down_exps.weight"]
    assert down.dims == (TINY.ffn, TINY.hidden, TINY.experts)
    expert_bytes = kind.num_bytes((TINY.hidden, TINY.ffn))
    third = data[start + down.offset + 3 * expert_bytes :][:expert_bytes]
    (file,) = checkpoint.glob("*.safetensors")
    with safe_open(file, "pt") as shard:
        expected = shard.get_tensor("model.layers.1.mlp.experts.3.down_proj.weight").float()
    found = torch.tensor(_numbers(kind, read, third)).view(TINY.hidden, TINY.ffn)
    off = float((found - expected).norm() / expected.norm())
    assert off <= {"BF16": 0.0, "Q8_0": 0.01, "Q4_0": 0.1}[kind.name]
    matrices = ("blk.0.attn_q", "blk.0.attn_output", "blk.1.ffn_gate_exps", "output")
    assert {tensors[f"{name}.weight"].code for name in matrices} == {kind.code}
    assert tensors["token_embd.weight"].code == BF16.code
    assert tensors["blk.0.attn_norm.weight"].dims == (TINY.hidden,)
    exact = ("blk.0.attn_norm", "blk.0.attn_q_norm", "blk.1.ffn_gate_inp", "output_norm")
    assert {tensors[f"{name}.weight"].code for name in exact} == {F32.code}
    last = max(tensors.values(), key=lambda tensor: tensor.offset)
    assert len(data) >= start + last.offset
