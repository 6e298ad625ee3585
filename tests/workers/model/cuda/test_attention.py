"""Attention of a whole batch as on a GPU, which reads the cache in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.cuda.device import DEVICE
from tests.workers.cuda.test_attention_kernels import BLOCK, LIMITS, fill
from tests.workers.model.test_attention import plain
from workers.model import fp8
from workers.model.attention import attend
from workers.model.attention_batch import (
    AttentionBatch,
    DecodeGroup,
    PagedRows,
    PrefillChunk,
    Workspace,
    chunk_mask,
    decode_mask,
)
from workers.model.compute_threads import ComputeThreads
from workers.model.cuda.attention import attend_in_place

LENGTHS, COUNTS = [13, 9, 21, 6], [1, 1, 5, 6]
"""Two decodes, a chunk in the middle of a prompt, and a whole prompt."""
ENDS = [1, 2, 7, 13]


def numbers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def batch_of(slots: Tensor, dtype: torch.dtype, paged: PagedRows | None = None) -> AttentionBatch:
    spaces = (Workspace(dtype, DEVICE),)
    return AttentionBatch(slots, (), (), spaces, ComputeThreads(), paged=paged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("num_heads", [2, 4])
def test_mixed_batch_equals_plain_attention(
    num_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    has = fill(LENGTHS, 8, 2, dtype)
    new = [range(n - count, n) for n, count in zip(LENGTHS, COUNTS, strict=True)]
    tables = has.tables.tolist()
    slots = [
        t[p // BLOCK] * BLOCK + p % BLOCK for t, own in zip(tables, new, strict=True) for p in own
    ]
    has.cache.view(4, -1, 8)[:, slots] = torch.nan  # the layer writes them
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(13, num_heads, 8, generator=generator).to(dtype)
    keys, values = (
        torch.cat([x[own.start :] for x, own in zip(part, new, strict=True)]).to(DEVICE)
        for part in (has.keys, has.values)
    )
    chunks = ((2, 7, 21), (7, 13, 6))
    paged = PagedRows(has.tables, has.lengths, numbers([0, *ENDS]), 2, chunks)
    batch = batch_of(torch.tensor(slots, device=DEVICE), dtype, paged)
    if window is not None:
        batch = batch.within(window)
    found = attend_in_place(queries.to(DEVICE), keys, values, has.cache, batch).cpu()
    parts = zip(queries.split_with_sizes(COUNTS), has.keys, has.values, strict=True)
    expected = torch.cat([plain(q, k, v, window) for q, k, v in parts])
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < LIMITS[dtype]


@pytest.mark.parametrize("window", [None, 3])
def test_an_fp8_cache_is_decoded_in_pieces(window: int | None) -> None:
    """The same rows through torch, which reads the same pieces."""
    dtype, generator = torch.float32, torch.Generator().manual_seed(2)
    rows = torch.randn(4, 8, BLOCK, 8, generator=generator)
    caches = [fp8.encode(rows).to(device) for device in ("cpu", DEVICE)]
    visible = decode_mask(torch.tensor([7, 5]), 8)
    decodes = (DecodeGroup(0, 2, torch.tensor([3, 1, 6, 0]), visible),)
    mask = chunk_mask(4, 5, torch.device("cpu"))
    prefills = (PrefillChunk(2, 7, 9, torch.tensor([2, 4, 5]), mask),)
    slots = torch.tensor([6, 24, 16, 17, 18, 19, 20])
    spaces = (Workspace(dtype, torch.device("cpu")),)
    batch = AttentionBatch(slots, decodes, prefills, spaces, ComputeThreads())
    queries = torch.randn(7, 4, 8, generator=generator)
    keys, values = torch.randn(2, 7, 2, 8, generator=generator)
    own = batch if window is None else batch.within(window)
    expected = attend(queries, keys, values, caches[0], own)
    moved = AttentionBatch(
        slots.to(DEVICE),
        (DecodeGroup(0, 2, decodes[0].blocks.to(DEVICE), visible.to(DEVICE)),),
        (PrefillChunk(2, 7, 9, prefills[0].blocks.to(DEVICE), None),),
        (Workspace(dtype, DEVICE),),
        ComputeThreads(),
    )
    own = moved if window is None else moved.within(window)
    queries, keys, values = (x.to(DEVICE) for x in (queries, keys, values))
    found = attend_in_place(queries, keys, values, caches[1], own)
    assert torch.equal(caches[1].cpu(), caches[0])
    assert (found.cpu() - expected).abs().max() < LIMITS[dtype]
