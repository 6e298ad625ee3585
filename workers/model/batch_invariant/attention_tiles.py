"""Batch-invariant attention, for ``--deterministic``.

Keys and values are read in tiles of 64 positions, always from position 0 of their sequence. The
shape of each tile's products does not depend on the batch, except for the number of query rows,
which has no effect from four rows on (``invariant`` checks this when the worker starts). Masked
positions contribute exactly zero, and tiles are added in order. So the result of a row has the same
bits in any batch, with any block table, in a chunk of any size, and as a decode row or as a prompt
row. All computation is in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.attention import write_rows
from workers.model.attention_batch import AttentionBatch, DecodeGroup, PrefillChunk, Workspace
from workers.model.batch_invariant.row_invariance import MAX_ROWS

TILE = 64
_MIN_QUERIES = 4
"""Minimum number of query rows of a product; fewer rows are padded with zeros."""
_PIECE_ELEMENTS = 1 << 20
"""Maximum number of elements of queries, scores and outputs of prompt rows in memory at a time, but
at least those of ``_MIN_QUERIES`` rows."""


def attend_tiles(
    queries: Tensor, keys: Tensor, values: Tensor | None, cache: Tensor, batch: AttentionBatch
) -> Tensor:
    """Write the rows' keys and values to the KV cache and attend, with batch-invariant results.

    Has the arguments and, up to rounding, the result of ``attention.attend``.
    """
    write_rows(keys, values, cache, batch.slot_mapping)
    if batch.recorder is not None:
        batch.recorder.attending(queries, cache, batch)
    num_kv_heads, head_dim = keys.shape[1:]
    # [T, K, A / K, D]: the query heads of each key head.
    space = batch.workspaces[0]
    scaled = queries.float() * batch.scale_of(head_dim)
    scaled = scaled.view(len(queries), num_kv_heads, -1, head_dim)
    parts = [_decode(scaled, cache, group, space, batch) for group in batch.decodes]
    for chunk in batch.prefills:
        parts += _prefill(scaled, cache, chunk, space, batch)
    return torch.cat(parts).flatten(1).to(queries.dtype)


def _decode(
    scaled: Tensor, cache: Tensor, group: DecodeGroup, space: Workspace, batch: AttentionBatch
) -> Tensor:
    """Attend with a group of decode rows; ``scaled`` queries [T, K, A / K, D] of all rows ->
    [rows, K, A / K, V] float32."""
    rows, sinks = group.last - group.first, batch.sinks
    found = _gather(cache, group.blocks.view(rows, -1), space, batch)
    heads = scaled[group.first : group.last].transpose(0, 1)
    lengths = group.lengths.view(rows, 1).expand(rows, heads.shape[2])
    own = None if sinks is None else sinks.view(len(heads), -1)
    return _attend(heads, found, lengths, group.window, own).transpose(0, 1)


def _prefill(
    scaled: Tensor, cache: Tensor, chunk: PrefillChunk, space: Workspace, batch: AttentionBatch
) -> list[Tensor]:
    """Attend with the rows of a prompt chunk; ``scaled`` queries [T, K, A / K, D] of all rows ->
    pieces [rows, K, A / K, V] float32, divided by ``_PIECE_ELEMENTS``."""
    keys, values = _gather(cache, chunk.blocks.view(1, -1), space, batch)
    num_kv_heads, group_size, head_dim = scaled.shape[1:]
    per_row = num_kv_heads * group_size * keys.shape[2] * (2 * head_dim + TILE)
    sinks = batch.sinks
    height = min(max(_MIN_QUERIES, _PIECE_ELEMENTS // per_row), MAX_ROWS)
    start = chunk.length - (chunk.last - chunk.first)
    parts = []
    for first in range(chunk.first, chunk.last, height):
        last = min(first + height, chunk.last)
        shape = (num_kv_heads, last - first, group_size, values.shape[-1])
        heads = scaled[first:last].transpose(0, 1)
        end = start + last - chunk.first
        lengths = torch.arange(end - (last - first) + 1, end + 1, device=cache.device)
        lengths = lengths.repeat_interleave(group_size).view(1, -1)
        count = -(-end // TILE)
        tiles = keys[:, :, :count], values[:, :, :count]
        own = None if sinks is None else sinks.view(num_kv_heads, -1).repeat(1, last - first)
        heads = heads.reshape(num_kv_heads, 1, -1, head_dim)
        output = _attend(heads, tiles, lengths, chunk.window, own)
        parts.append(output.view(shape).transpose(0, 1))
    return parts


def _gather(
    cache: Tensor, tables: Tensor, space: Workspace, batch: AttentionBatch
) -> tuple[Tensor, Tensor]:
    """Gather the keys [K, rows, tiles, TILE, D] and values [K, rows, tiles, TILE, V] of block
    tables [rows, blocks], as float32."""
    num_blocks, block_size = cache.shape[1:3]
    per_tiles = math.lcm(block_size, TILE) // block_size
    # The last block of the cache is the null block: zeros.
    tables = functional.pad(tables, (0, -tables.shape[1] % per_tiles), value=num_blocks - 1)
    found = space.float32(space.gather(cache, tables.reshape(-1)))
    shape = batch.num_kv_heads(cache), len(tables), -1, TILE, found.shape[-1]
    return batch.keys_values(found, *shape)


def _attend(
    heads: Tensor,
    found: tuple[Tensor, Tensor],
    lengths: Tensor,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with heads [K, rows, M, D] float32 to ``found`` (see ``_gather``): [K, rows, M, V].

    lengths [rows, M]: number of positions that a query attends to, at least one; with a ``window``,
    the query attends to the last ``window`` of these positions. sinks [K, M]: attention sinks, see
    ``AttentionBatch.sinks``.
    """
    num_kv_heads, rows, num_queries, head_dim = heads.shape
    missing = _MIN_QUERIES - num_queries
    if missing > 0:
        heads = functional.pad(heads, (0, 0, 0, missing))
        lengths = functional.pad(lengths, (0, missing), value=1)
        sinks = None if sinks is None else functional.pad(sinks, (0, missing))
    height, tiles = heads.shape[2], found[0].shape[2]
    shape = (num_kv_heads, rows, tiles, height)
    repeated = heads.unsqueeze(2).expand(*shape, head_dim).reshape(-1, height, head_dim)
    keys, values = (part.reshape(-1, TILE, part.shape[-1]) for part in found)
    scores = torch.bmm(repeated, keys.transpose(1, 2)).view(*shape, TILE)
    positions = torch.arange(tiles * TILE, device=heads.device).view(tiles, 1, TILE)
    ends = lengths.reshape(rows, 1, height, 1)
    scores.masked_fill_(positions >= ends, float("-inf"))
    if window is not None:
        scores.masked_fill_(positions < ends - window, float("-inf"))
    best = scores.amax((2, 4), keepdim=True)
    if sinks is not None:
        sinks = sinks.view(num_kv_heads, 1, 1, height, 1)
        best = torch.maximum(best, sinks)
    weights = scores.sub_(best).exp_()
    outputs = torch.bmm(weights.view(-1, height, TILE), values).view(*shape, -1)
    sums = weights.sum(-1, keepdim=True)
    total = heads.new_zeros((*heads.shape[:3], values.shape[-1]))
    norm = total.new_zeros((*heads.shape[:3], 1))
    if sinks is not None:
        norm += (sinks - best).exp_().squeeze(2)
    for tile in range(tiles):
        total += outputs[:, :, tile]
        norm += sums[:, :, tile]
    return total.div_(norm)[:, :, :num_queries]
