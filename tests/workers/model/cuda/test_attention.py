"""Attention of a whole batch as on a GPU, which reads the cache in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.cuda.device import DEVICE
from tests.workers.cuda.test_attention_kernels import BLOCK, LIMITS, fill
from tests.workers.model.test_attention import plain
from workers.model.attention_batch import AttentionBatch, PagedRows, Workspace
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
@pytest.mark.parametrize(("num_heads", "is_fp8"), [(2, False), (4, False), (4, True)])
def test_mixed_batch_equals_plain_attention(
    num_heads: int, is_fp8: bool, window: int | None, dtype: torch.dtype
) -> None:
    """Also with an fp8 cache, whose rows attend to rounded keys and values of their own step."""
    has = fill(LENGTHS, 8, 2, dtype, is_fp8)
    new = [range(n - count, n) for n, count in zip(LENGTHS, COUNTS, strict=True)]
    tables = has.tables.tolist()
    slots = [
        t[p // BLOCK] * BLOCK + p % BLOCK for t, own in zip(tables, new, strict=True) for p in own
    ]
    nothing = 0xFF if is_fp8 else torch.nan
    has.cache.view(4, -1, has.cache.shape[3])[:, slots] = nothing  # the layer writes them
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
    if is_fp8:  # these are rounded away
        keys, values = keys * 1.01, values * 1.01
    found = attend_in_place(queries.to(DEVICE), keys, values, has.cache, batch).cpu()
    parts = zip(queries.split_with_sizes(COUNTS), has.keys, has.values, strict=True)
    expected = torch.cat([plain(q, k, v, window) for q, k, v in parts])
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < LIMITS[dtype]
