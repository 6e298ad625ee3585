"""Attention over blocks of the cache in place, against a plain one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.workers.cuda.device import DEVICE
from tests.workers.model.test_attention import plain
from workers.cuda.decode_attention import decode, num_splits
from workers.cuda.prefill_attention import prefill
from workers.model import fp8

pytestmark = pytest.mark.heavy

BLOCK = 4
LIMITS = {torch.float32: 1e-5, torch.float16: 0.005, torch.bfloat16: 0.03}
SLOW = pytest.mark.slow
SHAPES = [(24, 4, 2), pytest.param((16, 2, 2), marks=SLOW), pytest.param((40, 6, 2), marks=SLOW)]
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=SLOW)]


@dataclass
class Filled:
    """Sequences whose keys and values are in blocks of a cache. All other memory has NaN."""

    cache: Tensor
    tables: Tensor
    lengths: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def fill(
    lengths: list[int], dim: int, num_kv_heads: int, dtype: torch.dtype, is_fp8: bool = False
) -> Filled:
    """With ``is_fp8``, the keys and values are those that the codes of an fp8 cache stand for."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-n // BLOCK) for n in lengths]
    blocks = torch.randperm(sum(counts) + 1, generator=generator).split_with_sizes([*counts, 1])
    tables = torch.full((len(lengths), max(counts) + 2), 10**6, dtype=torch.int32)
    cache = torch.full((2 * num_kv_heads, sum(counts) + 1, BLOCK, dim), torch.nan, dtype=dtype)
    drawn = torch.randn(2, sum(lengths), num_kv_heads, dim, generator=generator).to(dtype)
    stored = drawn
    if is_fp8:
        drawn[:, ::7, 0] = 0  # rows of zeros
        drawn[1, ::5] /= 100  # scales of other sizes
        stored = fp8.encode(drawn)
        drawn = fp8.decode(stored, dtype)
        cache = fp8.encode(cache)
    keys, values = ([*part.split_with_sizes(lengths)] for part in drawn)
    for i, (length, own) in enumerate(zip(lengths, blocks, strict=False)):
        tables[i, : counts[i]] = own
        places = torch.arange(length)
        where = own[places // BLOCK], places % BLOCK
        first = sum(lengths[:i])
        for part, rows in zip(cache.chunk(2), stored, strict=True):
            part[:, *where] = rows[first : first + length].transpose(0, 1)
    sizes = torch.tensor(lengths, dtype=torch.int32)
    return Filled(cache.to(DEVICE), tables.to(DEVICE), sizes.to(DEVICE), keys, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 5, pytest.param(100, marks=SLOW)])
@pytest.mark.parametrize("splits", [1, 4, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_decodes_equal_plain_attention(
    has_sinks: bool,
    splits: int,
    window: int | None,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    dim, num_heads, num_kv_heads = shape
    lengths = [150, 9, 1, 0]
    has = fill(lengths, dim, num_kv_heads, dtype)
    queries = torch.randn(4, num_heads, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = torch.full_like(queries, torch.nan, device=DEVICE)
    sinks = torch.randn(num_heads) if has_sinks else None
    own = None if sinks is None else sinks.to(DEVICE)
    decode(queries.to(DEVICE), has.cache, has.tables, has.lengths, window, out, splits, own)
    found = out.cpu().view(4, -1).double()
    for i in range(3):
        expected = plain(queries[i : i + 1], has.keys[i], has.values[i], window, sinks)
        assert (found[i] - expected).abs().max() < LIMITS[dtype]
    assert not found[3].any(), "a row without keys is zeros"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 5, pytest.param(100, marks=SLOW)])
@pytest.mark.parametrize(
    ("skips_whole", "has_sinks"), [(False, False), (True, False), (False, True)]
)
def test_chunks_equal_plain_attention(
    skips_whole: bool,
    has_sinks: bool,
    window: int | None,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """With keys of earlier steps, without, none at all, and a single row."""
    dim, num_heads, num_kv_heads = shape
    lengths, counts = [150, 9, 4, 33], [70, 9, 0, 1]
    has = fill(lengths, dim, num_kv_heads, dtype)
    first_rows = [3, 73, 82, 82, 83]  # other rows of the batch come first
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(83, num_heads, dim, generator=generator).to(dtype)
    out = torch.full_like(queries, 7.0, device=DEVICE)
    firsts = torch.tensor(first_rows, dtype=torch.int32, device=DEVICE)
    sinks = torch.randn(num_heads) if has_sinks else None
    own = None if sinks is None else sinks.to(DEVICE)
    prefill(
        queries.to(DEVICE),
        has.cache,
        has.tables,
        has.lengths,
        firsts,
        max(counts),
        window,
        out,
        skips_whole,
        own,
    )
    found = out.cpu().view(83, -1).double()
    assert (found[:3] == 7).all()
    for i, count in enumerate(counts):
        rows = slice(first_rows[i], first_rows[i] + count)
        if skips_whole and count == lengths[i]:
            assert (found[rows] == 7).all()
        elif count:
            expected = plain(queries[rows], has.keys[i], has.values[i], window, sinks)
            assert (found[rows] - expected).abs().max() < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("window", "splits", "has_sinks"),
    [(None, 4, False), (5, 1, True), pytest.param(100, 2, False, marks=SLOW)],
)
def test_an_fp8_cache_is_attended_to_as_if_it_was_dequantized(
    window: int | None,
    splits: int,
    has_sinks: bool,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """Decodes, one of a row without keys, and chunks in the middle and at the begin of prompts."""
    dim, num_heads, num_kv_heads = shape
    lengths, counts = [150, 9, 1, 0], [70, 9, 1, 0]
    has = fill(lengths, dim, num_kv_heads, dtype, is_fp8=True)
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(80, num_heads, dim, generator=generator).to(dtype)
    sinks = torch.randn(num_heads, generator=generator) if has_sinks else None
    own = None if sinks is None else sinks.to(DEVICE)
    ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    last = ends[1:].clamp(min=1) - 1
    chunks = torch.full_like(queries, torch.nan, device=DEVICE)
    decodes = torch.full_like(queries[:4], torch.nan, device=DEVICE)
    rows = queries.to(DEVICE)
    decode(rows[last], has.cache, has.tables, has.lengths, window, decodes, splits, own)
    prefill(
        rows, has.cache, has.tables, has.lengths, ends.to(DEVICE), 70, window, chunks, sinks=own
    )
    assert not decodes[3].any()
    for i, count in enumerate(counts[:3]):
        mine = slice(int(ends[i]), int(ends[i]) + count)
        expected = plain(queries[mine], has.keys[i], has.values[i], window, sinks)
        found = chunks[mine].cpu().view(count, -1).double()
        assert (found - expected).abs().max() < LIMITS[dtype]
        assert (decodes[i].cpu().flatten().double() - expected[-1]).abs().max() < LIMITS[dtype]


def test_splits_follow_from_shapes_and_are_powers_of_two() -> None:
    assert num_splits(num_rows=1, num_kv_heads=16, max_length=64) == 1
    assert num_splits(num_rows=1, num_kv_heads=16, max_length=32768) == 64
    assert num_splits(num_rows=64, num_kv_heads=16, max_length=32768) == 1
    assert num_splits(num_rows=8, num_kv_heads=16, max_length=2048) == 8
