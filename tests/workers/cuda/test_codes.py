"""What GPUs run on four bytes of codes at a time, instruction by instruction."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tests.workers.cuda.device  # noqa: F401 (skips this where there is no Triton)
from workers.cuda import codes
from workers.quantization.formats import Codes
from workers.quantization.matrix import decode_codes

KINDS: dict[Codes, str] = {"int4": codes.INT4.value, "e2m1": codes.E2M1.value}


def executed(text: str, registers: dict[str, int]) -> dict[str, int]:
    """Run PTX on registers of 32 bits by name."""

    def value(word: str) -> int:
        return registers[word] if word in registers else int(word, 0)

    for line in re.sub(r"[{}]", "", text).split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *words = (word.strip() for word in rest.split(","))
        registers[target] = OPERATIONS[name](*map(value, words)) & 0xFFFFFFFF
    return registers


def permuted(low: int, high: int, selector: int) -> int:
    """``prmt``: bytes of both words, by four numbers of 4 bits."""
    data = (low | high << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(data[selector >> 4 * i & 7] for i in range(4)), "little")


def looked_up(a: int, b: int, c: int, table: int) -> int:
    """``lop3``: any function of three bits."""
    bits = (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1 for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


def halves(word: int) -> Tensor:
    """The two bfloat16 numbers of a word, float64."""
    pair = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32)
    return pair.to(torch.int16).view(torch.bfloat16).double()


def fused(a: int, b: int, c: int) -> int:
    """``fma.rn.bf16x2`` of numbers whose product and sum float64 holds."""
    rounded = (halves(a) * halves(b) + halves(c)).to(torch.bfloat16).view(torch.int16)
    low, high = (int(bits) & 0xFFFF for bits in rounded)
    return low | high << 16


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "prmt.b32": permuted,
    "lop3.b32": looked_up,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "shf.r.wrap.b32": lambda low, high, count: (high << 32 | low) >> (count & 31),
    "fma.rn.bf16x2": fused,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_becomes_its_two_numbers(kind: Codes) -> None:
    for first in range(0, 256, 4):
        group = bytes((first, 255 - first, first + 2, first + 3))
        found = executed(KINDS[kind], {"$4": int.from_bytes(group, "little")})
        low, high = (torch.cat([halves(found[f"${i + j}"]) for j in range(2)]) for i in (0, 2))
        expected = decode_codes(torch.tensor(list(group), dtype=torch.uint8), kind).view(4, 2)
        assert torch.equal(torch.stack((low, high), 1), expected.double())


def test_a_product_is_that_of_bfloat16() -> None:
    x, y = 0xC0403F80, 0x3E003D80  # 1 and -3, 0.0625 and 0.125
    found = executed(codes.PRODUCT.value, {"$1": x, "$2": y})["$0"]
    assert halves(found).tolist() == [0.0625, -0.375]
    zero = executed(codes.PRODUCT.value, {"$1": 0x80000000, "$2": y})["$0"]
    assert zero == 0x80000000, "the sign of a zero stays"
