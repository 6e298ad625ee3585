"""Paged attention against a plain one, and the helpers that form batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workers.model.attention import attend
from workers.model.attention_batch import (
    AttentionBatch,
    DecodeGroup,
    PrefillChunk,
    Workspace,
    chunk_mask,
    group_size,
    runs,
)
from workers.model.batch_invariant.attention_tiles import attend_tiles
from workers.model.compute_threads import ComputeThreads
from workers.model.layers import Attend

CPU = torch.device("cpu")
BLOCK, DIM = 4, 8


def plain(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries [n, A, D] at the last n positions of keys and values [m, K, D], in double.

    sinks [A]: a key's score without a value, for each head.
    """
    n, num_heads, dim = queries.shape
    m, num_kv_heads = keys.shape[:2]
    outputs = torch.zeros(n, num_heads, dim, dtype=torch.float64)
    for row in range(n):
        end = m - n + row + 1
        visible = slice(0 if window is None else max(end - window, 0), end)
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = keys[visible, kv_head].double() @ queries[row, head].double() / math.sqrt(dim)
            if sinks is not None:
                scores = torch.cat((scores, sinks[head : head + 1].double()))
            weights = torch.softmax(scores, 0)[: end - visible.start]
            outputs[row, head] = weights @ values[visible, kv_head].double()
    return outputs.view(n, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 10, 100])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("function", [attend, attend_tiles], ids=["fast", "tiles"])
def test_mixed_batch_equals_plain_attention(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    window: int | None,
    function: Attend,
    has_sinks: bool,
) -> None:
    """Two decodes (13 and 9 tokens), a chunk in the middle of a prompt, and a whole prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths, counts = [13, 9, 11, 6], [1, 1, 5, 6]
    tables = [[7, 2, 11, 5], [1, 8, 3], [4, 9, 10], [6, 12]]
    null = 14
    cache = torch.zeros(2 * num_kv_heads, null + 1, BLOCK, DIM, dtype=dtype)
    keys, values = (
        [torch.randn(n, num_kv_heads, DIM, generator=generator).to(dtype) for n in lengths]
        for _ in range(2)
    )
    slots = [
        [t[p // BLOCK] * BLOCK + p % BLOCK for p in range(n)]
        for t, n in zip(tables, lengths, strict=True)
    ]
    flat = cache.view(2 * num_kv_heads, -1, DIM)
    for i, count in enumerate(counts):  # what earlier steps wrote
        for position in range(lengths[i] - count):
            flat[:num_kv_heads, slots[i][position]] = keys[i][position]
            flat[num_kv_heads:, slots[i][position]] = values[i][position]
    queries = [torch.randn(n, num_heads, DIM, generator=generator).to(dtype) for n in counts]
    padded = torch.tensor([*tables[0], *tables[1], null])
    visible = torch.arange(16) < torch.tensor([[13], [9]])
    batch = AttentionBatch(
        slot_mapping=torch.tensor([s for i, n in enumerate(counts) for s in slots[i][-n:]]),
        decodes=(DecodeGroup(0, 2, padded, visible),),
        prefills=(
            PrefillChunk(2, 7, 11, torch.tensor(tables[2]), chunk_mask(6, 5, CPU)),
            PrefillChunk(7, 13, 6, torch.tensor(tables[3]), chunk_mask(0, 6, CPU)),
        ),
        workspaces=(Workspace(dtype, CPU), Workspace(dtype, CPU)),
        compute_threads=ComputeThreads(2),
    )
    new_keys = torch.cat([k[-n:] for k, n in zip(keys, counts, strict=True)])
    new_values = torch.cat([v[-n:] for v, n in zip(values, counts, strict=True)])
    if window is not None:
        batch = batch.within(window)
    sinks = torch.randn(num_heads, generator=generator) if has_sinks else None
    batch = replace(batch, sinks=sinks)
    found = function(torch.cat(queries), new_keys, new_values, cache, batch)
    expected = torch.cat(
        [plain(q, k, v, window, sinks) for q, k, v in zip(queries, keys, values, strict=True)]
    )
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < limit
    assert (cache[:, null] == 0).all()


def test_group_size_depends_on_the_row_alone_and_wastes_at_most_half() -> None:
    sizes = [group_size(n) for n in range(1, 300)]
    assert sizes == sorted(sizes)
    assert sorted(set(sizes))[:10] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert all(n <= size < 1.5 * n + 1 for n, size in enumerate(sizes, 1))


def test_runs() -> None:
    assert runs([], 10) == []
    assert runs([8, 8, 8, 12], 20) == [(0, 2), (2, 3), (3, 4)]
    assert runs([8, 8, 12], 1000) == [(0, 2), (2, 3)]
    assert runs([50, 50], 10) == [(0, 1), (1, 2)]


def test_chunk_mask() -> None:
    assert chunk_mask(0, 5, CPU) is None
    mask = chunk_mask(2, 2, CPU)
    assert mask is not None
    assert mask.tolist() == [[True, True, True, False], [True, True, True, True]]
