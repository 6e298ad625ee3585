"""Rows of an fp8 cache in kernels: the bits and the numbers of ``workers.model.fp8``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.cuda.device import DEVICE
from tests.workers.cuda.test_codes import executed, halves
from workers.cuda.cache_rows import E4M3
from workers.cuda.decode_attention import decode
from workers.cuda.heads import prepare_heads
from workers.model import fp8

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # of the interpreter
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored(vectors: Tensor) -> Tensor:
    """The cache rows [n, D + 1] that the kernel writes for values [n, D]: one row with n heads."""
    num_heads, dim = vectors.shape
    zeros = torch.zeros(2 * num_heads, dim).to(vectors)
    rows = torch.cat((zeros, vectors)).view(1, -1).to(DEVICE)
    waves = torch.zeros(1, 1, dim).to(rows)
    cache = torch.full((2 * num_heads, 2, 3, dim + 1), 7, dtype=fp8.ROW_DTYPE, device=DEVICE)
    slots = torch.tensor([4], device=DEVICE)
    heads = prepare_heads(rows, num_heads, None, 0.0, None, (waves, waves), cache, slots)
    assert heads.keys_values.shape == (1, 2 * num_heads, dim)
    found = cache.view(2 * num_heads, 6, dim + 1).cpu()
    assert (found[:, [0, 1, 2, 3, 5]] == 7).all()
    assert torch.equal(found[:num_heads, 4], fp8.encode(zeros[:num_heads].cpu())), "keys"
    return found[num_heads:, 4]


def extremes(dtype: torch.dtype) -> Tensor:
    """Vectors [n, 4] at the borders of what is stored."""
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    if dtype == torch.bfloat16:
        tiny *= 8  # the interpreter reads subnormal numbers as zeros
    return torch.tensor(
        [
            [0.0, -0.0, 0.0, 0.0],
            [448.0, -448.0, 432.0, -2.125],
            [449.0, 447.0, 464.0, 480.0],
            [1.75, 1.7578125, -1.75, 2**-10],
            [-top, top, 1.0, 0.0],
            [tiny, -tiny / 4, tiny / 2, 0.0],
            [tiny / 8, 0.0, tiny / 2, -tiny / 8],
            [1.0, torch.nan, -1.0, 0.0],
            [1.0, -torch.nan, torch.inf, 0.0],
            [-torch.inf, 3.0, 0.0, -0.0],
        ]
    ).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_are_stored_as_torch_does(dtype: torch.dtype) -> None:
    vectors = extremes(dtype)
    assert torch.equal(stored(vectors), fp8.encode(vectors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 64])
def test_random_vectors_are_stored_as_torch_does(dim: int, dtype: torch.dtype) -> None:
    """With elements that are far smaller than the largest one, and ties."""
    generator = torch.Generator().manual_seed(dim)
    wide = torch.randn(60, dim, generator=generator)
    wide *= torch.exp2(torch.randint(-20, 1, (60, dim), generator=generator))
    ties = torch.randint(-512, 513, (60, dim), generator=generator) / 2**5
    vectors = torch.cat((wide, ties, ties / 2**9)).to(dtype)
    vectors[60:, 0] = 448  # the scale is 1
    assert torch.equal(stored(vectors), fp8.encode(vectors))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_code_and_scale_is_read_as_torch_does(dtype: torch.dtype) -> None:
    """Attention of a row with one key is the key's value."""
    scales = torch.tensor([1 if dtype == torch.float32 else 20, 40, 119, 127, 200, 246, 255])
    codes = torch.arange(256).expand(len(scales), -1)
    rows = torch.cat((codes, scales.unsqueeze(1)), 1).to(fp8.ROW_DTYPE)
    cache = torch.zeros(2, len(scales), 4, 257, dtype=fp8.ROW_DTYPE)
    cache[1, :, 0] = rows
    tables = torch.arange(len(scales), dtype=torch.int32, device=DEVICE).unsqueeze(1)
    queries = torch.ones(len(scales), 1, 256, dtype=dtype, device=DEVICE)
    out, lengths = torch.empty_like(queries), torch.ones_like(tables[:, 0])
    decode(queries, cache.to(DEVICE), tables, lengths, None, out)
    found, expected = out.cpu()[:, 0], fp8.decode(rows, dtype)
    assert found[-1].isnan().all(), "a vector that was not finite"
    is_number = codes[0] & 0x7F != 0x7F
    assert torch.equal(found[:-1, is_number], expected[:-1, is_number])


@pytest.mark.parametrize("first_byte", range(4))
def test_four_bytes_are_dequantized_on_gpus_as_torch_does(first_byte: int) -> None:
    """The instructions that GPUs run for bfloat16, for every code at every place of a word."""
    for first in range(256):
        codes = [first, 255 - first, first ^ 0x80, first ^ 0x55]
        word = int.from_bytes(bytes(codes), "little") << 8 * first_byte
        scale = 20 + first % 200
        given = {"$2": word & 0xFFFFFFFF, "$3": word >> 32, "$4": 8 * first_byte}
        done = executed(E4M3.value, {**given, "$5": scale * 0x00800080})
        found = torch.cat([halves(done[f"${i}"]) for i in range(2)])
        expected = fp8.decode(torch.tensor([*codes, scale], dtype=torch.uint8), torch.bfloat16)
        is_number = ~expected.isnan()
        assert torch.equal(found[is_number], expected.double()[is_number])
    nothing = {"$2": 0x7F7F7F7F, "$3": 0, "$4": 0, "$5": 0x7FC07FC0}
    assert halves(executed(E4M3.value, nothing)["$1"]).isnan().all()
