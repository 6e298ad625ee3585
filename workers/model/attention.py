"""Attention over paged keys and values: SDPA for prompt chunks, batched products for decodes.

The cache of a layer is [2 * num_kv_heads, num_blocks, block_size, D], keys before values. In an fp8
cache, the last dimension is a row of ``workers.model.fp8``. A latent cache
(``AttentionBatch.latent_rank``) is [1, num_blocks, block_size, D]: it stores only keys, and the
first elements of a key are the value.

Decode attention copies (gathers) the blocks of a few sequences at a time into a workspace, in which
the keys of each head and sequence are contiguous, as fast batched products need. The workspace is
reused: page faults of new memory would cost more than the products. For 32 sequences of 192 tokens,
8 heads of 64, bfloat16, one busy core of an AMD EPYC: SDPA over [B, L, heads, D] 10 ms, products in
new memory 15 ms, in a workspace 4.0 ms, in pieces of 3 MB 2.3 ms (1024 tokens: 83, 27 and 19 ms).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from workers.model import fp8
from workers.model.attention_batch import AttentionBatch, DecodeGroup, PrefillChunk, Workspace


def attend(
    queries: Tensor, keys: Tensor, values: Tensor | None, cache: Tensor, batch: AttentionBatch
) -> Tensor:
    """Write the rows' keys and values to the KV cache, and attend: queries [T, A, D] -> [T, A * V].

    keys [T, K, D]; values [T, K, V], where V = D; None: latent attention, where V is
    ``latent_rank``. A is a multiple of K; key head j serves query heads j * (A / K) ..
    (j + 1) * (A / K) - 1.
    """
    write_rows(keys, values, cache, batch.slot_mapping)
    if batch.recorder is not None:
        batch.recorder.attending(queries, cache, batch)
    pieces: tuple[DecodeGroup | PrefillChunk, ...] = (*batch.decodes, *batch.prefills)
    if len(pieces) == 1:
        return _attend_piece(queries, cache, pieces[0], batch.workspaces[0], batch)

    def attend_to(first: int, last: int, space: Workspace) -> list[Tensor]:
        return [_attend_piece(queries, cache, piece, space, batch) for piece in pieces[first:last]]

    shares = batch.compute_threads.split([float(piece.cost) for piece in pieces])
    tasks = [partial(attend_to, *share, batch.workspaces[i]) for i, share in enumerate(shares)]
    parts = [part for share in batch.compute_threads.run(tasks) for part in share]
    return torch.cat(parts)


def _attend_piece(
    queries: Tensor,
    cache: Tensor,
    piece: DecodeGroup | PrefillChunk,
    space: Workspace,
    batch: AttentionBatch,
) -> Tensor:
    if isinstance(piece, DecodeGroup):
        return _decode(queries, cache, piece, space, batch)
    if batch.sinks is None and batch.latent_rank is None:
        return _prefill(queries, cache, piece, space, batch)
    return _prefill_by_scores(queries, cache, piece, space, batch)


def write_rows(keys: Tensor, values: Tensor | None, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys and values [T, K, D] to the KV cache slots ``slot_mapping`` [T]; values None:
    write only keys, as for latent attention."""
    slots, num_kv_heads = cache.view(len(cache), -1, cache.shape[3]), keys.shape[1]
    for rows, place in ((keys, slots[:num_kv_heads]), (values, slots[num_kv_heads:])):
        if rows is not None:
            stored = fp8.encode(rows) if cache.dtype == fp8.ROW_DTYPE else rows
            place.index_copy_(1, slot_mapping, stored.transpose(0, 1))


def _decode(
    queries: Tensor, cache: Tensor, group: DecodeGroup, space: Workspace, batch: AttentionBatch
) -> Tensor:
    """Attend with a group of decode rows: [rows, A * V]. Scores and softmax are float32; the
    softmax is rounded to the model dtype before it is multiplied by the values."""
    rows = group.last - group.first
    num_kv_heads, head_dim = batch.num_kv_heads(cache), queries.shape[-1]
    found = space.gather(cache, group.blocks)
    keys, values = batch.keys_values(found, num_kv_heads * rows, -1, head_dim)
    by_head = queries[group.first : group.last].view(rows, num_kv_heads, -1, head_dim)
    heads = by_head.transpose(0, 1).reshape(num_kv_heads * rows, -1, head_dim)
    scaled = heads.float() * batch.scale_of(head_dim)
    scores = torch.bmm(scaled, space.float32(keys).transpose(1, 2))
    masked = ~group.visible.view(1, rows, 1, -1)
    by_row = scores.view(num_kv_heads, rows, -1, scores.shape[-1])
    by_row.masked_fill_(masked, float("-inf"))
    weights = softmax(by_row, batch.sinks).view_as(scores).to(values.dtype)
    output = torch.bmm(weights, values).view(num_kv_heads, rows, -1, values.shape[-1])
    return output.transpose(0, 1).reshape(rows, -1)


def _prefill(
    queries: Tensor, cache: Tensor, chunk: PrefillChunk, space: Workspace, batch: AttentionBatch
) -> Tensor:
    """Attend with the rows of a prompt chunk, using torch's SDPA: [rows, A * V]."""
    rows = chunk.last - chunk.first
    num_kv_heads, (num_heads, head_dim) = batch.num_kv_heads(cache), queries.shape[1:]
    found = space.gather(cache, chunk.blocks)
    keys, values = batch.keys_values(found, 1, num_kv_heads, -1, head_dim)
    output = functional.scaled_dot_product_attention(
        queries[chunk.first : chunk.last].transpose(0, 1).unsqueeze(0),
        keys[:, :, : chunk.length],
        values[:, :, : chunk.length],
        attn_mask=chunk.visible,
        is_causal=chunk.visible is None,
        scale=batch.scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return output.squeeze(0).transpose(0, 1).reshape(rows, -1)


_SCORES = 1 << 22
"""Maximum number of attention scores in memory at a time, but at least those of one prompt row."""


def _prefill_by_scores(
    queries: Tensor, cache: Tensor, chunk: PrefillChunk, space: Workspace, batch: AttentionBatch
) -> Tensor:
    """Attend with a prompt chunk: [rows, A * V], without SDPA, which supports neither sinks nor
    values that are narrower than keys."""
    num_kv_heads, (num_heads, head_dim) = batch.num_kv_heads(cache), queries.shape[1:]
    found = space.gather(cache, chunk.blocks)
    keys, values = batch.keys_values(found, num_kv_heads, -1, head_dim)
    exact = space.float32(keys)[:, : chunk.length].transpose(1, 2)
    values = values[:, : chunk.length]
    visible = chunk.visible
    if visible is None:
        size = (chunk.last - chunk.first, chunk.length)
        visible = torch.ones(size, dtype=torch.bool, device=queries.device).tril()
    height = max(_SCORES // (num_heads * chunk.length), 1)
    own = queries[chunk.first : chunk.last]
    parts = []
    pieces = zip(torch.split(own, height), torch.split(visible, height), strict=True)
    for rows, mask in pieces:
        # The query heads of a key head are rows of one product.
        by_head = rows.view(len(rows), num_kv_heads, -1, head_dim).transpose(0, 1)
        heads = by_head.reshape(num_kv_heads, -1, head_dim).float() * batch.scale_of(head_dim)
        scores = torch.bmm(heads, exact).view(num_kv_heads, len(rows), -1, chunk.length)
        scores.masked_fill_(~mask.unsqueeze(1), float("-inf"))
        weights = softmax(scores, batch.sinks).flatten(1, 2).to(values.dtype)
        output = torch.bmm(weights, values).view(num_kv_heads, len(rows), -1, values.shape[-1])
        parts.append(output.transpose(0, 1).reshape(len(rows), -1))
    return torch.cat(parts)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax of scores [K, rows, A / K, keys] float32 over the keys and, unless None,
    ``sinks`` [A], one more score per head; the result has no column for the sinks."""
    if sinks is None:
        return torch.softmax(scores, -1)
    own = sinks.view(len(scores), 1, -1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores, own), -1), -1)[..., :-1]


def attention_map(
    queries: Tensor, cache: Tensor, chunk: PrefillChunk, batch: AttentionBatch
) -> Tensor:
    """Return the attention probabilities of a chunk's rows: [K, A / K, rows, length] float32, 0
    where a row does not attend.

    ``queries`` [T, A, D]: of all rows of the batch; the keys are read from ``cache``; ``batch``
    has the layer's scale and sinks.
    """
    num_kv_heads, head_dim = batch.num_kv_heads(cache), queries.shape[-1]
    found = cache[:num_kv_heads].index_select(1, chunk.blocks)
    if cache.dtype == fp8.ROW_DTYPE:
        found = fp8.decode(found, queries.dtype)
    keys = found.view(num_kv_heads, 1, -1, head_dim)[:, :, : chunk.length].float()
    rows = queries[chunk.first : chunk.last].view(
        chunk.last - chunk.first, num_kv_heads, -1, head_dim
    )
    scores = rows.permute(1, 2, 0, 3).float() @ keys.transpose(2, 3) * batch.scale_of(head_dim)
    visible = chunk.visible
    if visible is None:
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    return softmax(scores.transpose(1, 2), batch.sinks).transpose(1, 2)
