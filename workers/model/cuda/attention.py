"""Attention on a GPU with kernels that read the KV cache in place. Results are those of
``workers.model.attention`` up to rounding.

A chunk that begins its sequence attends only to keys of the current step, so torch's SDPA computes
it with FlashAttention. For float32 or with a mask, SDPA does not use FlashAttention, and with
grouped heads keeps all scores in memory; in these cases the kernels are used.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from workers.model import fp8
from workers.model.attention import write_rows
from workers.model.attention_batch import (
    AttentionBatch,
    DecodeGroup,
    PagedRows,
    PrefillChunk,
    Workspace,
)


def attend_in_place(
    queries: Tensor, keys: Tensor, values: Tensor | None, cache: Tensor, batch: AttentionBatch
) -> Tensor:
    """Write the rows' keys and values to the KV cache and attend, with GPU kernels.

    Has the arguments and, up to rounding, the result of ``attention.attend``. Latent attention
    (``values`` None) is not supported.
    """
    assert values is not None, "a latent cache"
    write_rows(keys, values, cache, batch.slot_mapping)
    return attend_written(queries.contiguous(), keys, values, cache, batch)


def attend_written(
    queries: Tensor, keys: Tensor, values: Tensor, cache: Tensor, batch: AttentionBatch
) -> Tensor:
    """Attend like ``attend_in_place``, for rows whose keys and values are already in the cache.

    ``queries`` are contiguous. An fp8 cache is dequantized piece by piece, for which the batch
    needs ``decodes`` and ``prefills``; for other caches, the batch needs ``paged``.
    """
    assert batch.scale is None, "the kernels have a scale of their own"
    assert batch.latent_rank is None, "latent caches have no kernel"
    if batch.recorder is not None:
        batch.recorder.attending(queries, cache, batch)
    out = torch.empty_like(queries)
    if cache.dtype == fp8.ROW_DTYPE:
        pieces: tuple[DecodeGroup | PrefillChunk, ...] = (*batch.decodes, *batch.prefills)
        for piece in pieces:
            rows = slice(piece.first, piece.last)
            space = batch.workspaces[0]
            _attend_piece(queries[rows], cache, piece, space, batch.sinks, out[rows])
    else:
        assert batch.paged is not None
        _attend_paged(queries, keys, values, cache, batch.paged, batch.sinks, out)
    return out.view(len(out), -1)


def warm_kernels(
    cache: Tensor, num_heads: int, windows: Collection[int], max_length: int, has_sinks: bool
) -> None:
    """Compile all variants of the attention kernels that sequences of up to ``max_length`` tokens
    need.

    cache [2 * K, num_blocks, block_size, D] in the dtype of the queries; it is not written.
    ``windows``: widths of the model's sliding windows. ``has_sinks``: whether the model has
    attention sinks.
    """
    from workers.cuda.decode_attention import decode, num_splits
    from workers.cuda.prefill_attention import prefill

    queries = cache.new_zeros(1, num_heads, cache.shape[3])
    out, blocks = torch.empty_like(queries), torch.zeros(2, dtype=torch.int32, device=cache.device)
    tables, lengths = blocks[:1].view(1, 1), torch.ones_like(blocks[:1])
    first_rows = torch.arange(2, dtype=torch.int32, device=cache.device)
    sinks = torch.zeros(num_heads, device=cache.device) if has_sinks else None
    most = num_splits(1, cache.shape[0] // 2, max_length)
    for window in {None, *sorted(windows)[:1]}:
        for power in range(most.bit_length()):
            decode(queries, cache, tables, lengths, window, out, splits=1 << power, sinks=sinks)
        for skips_whole in (False, True):
            prefill(
                queries,
                cache,
                tables,
                lengths,
                first_rows,
                1,
                window,
                out,
                skips_whole=skips_whole,
                sinks=sinks,
            )


def _attend_paged(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cache: Tensor,
    paged: PagedRows,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    from workers.cuda.decode_attention import decode
    from workers.cuda.prefill_attention import prefill

    window, num_decodes = paged.window, paged.num_decodes
    if num_decodes:
        tables, lengths = paged.tables[:num_decodes], paged.lengths[:num_decodes]
        decode(
            queries[:num_decodes], cache, tables, lengths, window, out[:num_decodes], sinks=sinks
        )
    may_be_plain = window is None and sinks is None and queries.dtype != torch.float32
    plain = [(a, b) for a, b, length in paged.chunks if may_be_plain and length == b - a]
    for rows in (slice(*chunk) for chunk in plain):
        out[rows] = _plain_causal(queries[rows], keys[rows], values[rows])
    if len(plain) < len(paged.chunks):
        prefill(
            queries,
            cache,
            paged.tables[num_decodes:],
            paged.lengths[num_decodes:],
            paged.first_rows[num_decodes:],
            max(last - first for first, last, _ in paged.chunks),
            window,
            out,
            skips_whole=may_be_plain,
            sinks=sinks,
        )


def _plain_causal(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend causally with the first n tokens of a sequence, using torch's SDPA: queries [n, A, D],
    keys and values [n, K, D] -> [n, A, D]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (queries, keys, values))
    has_groups = queries.shape[1] != keys.shape[1]
    output = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=has_groups)
    return output.squeeze(0).transpose(0, 1)


def _attend_piece(
    queries: Tensor,
    cache: Tensor,
    piece: DecodeGroup | PrefillChunk,
    space: Workspace,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Attend with the rows of a piece: copy the piece's blocks of the cache, dequantized, to
    scratch memory, and run a kernel on the copy. Writes the result to ``out``."""
    from workers.cuda.decode_attention import decode
    from workers.cuda.prefill_attention import prefill

    own = space.gather(cache, piece.blocks)
    blocks = torch.arange(own.shape[1], dtype=torch.int32, device=own.device)
    if isinstance(piece, DecodeGroup):
        tables = blocks.view(len(queries), -1)
        decode(queries, own, tables, piece.lengths.int(), piece.window, out, sinks=sinks)
    else:
        rows = len(queries)
        lengths = torch.full_like(blocks[:1], piece.length)
        first_rows = torch.arange(0, rows + 1, rows, dtype=torch.int32, device=own.device)
        tables = blocks.unsqueeze(0)
        window = piece.window
        prefill(queries, own, tables, lengths, first_rows, rows, window, out, sinks=sinks)
