"""Attention on a GPU with kernels that read the KV cache in place. Results are those of
``workers.model.attention`` up to rounding.

A chunk that begins its sequence attends only to keys of the current step, so torch's SDPA computes
it with FlashAttention. For float32 or with a mask, SDPA does not use FlashAttention, and with
grouped heads keeps all scores in memory; in these cases the kernels are used. They are also used
with an fp8 cache, because rows attend to the rounded keys and values, however a prompt is split.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from workers.model import fp8
from workers.model.attention import write_rows
from workers.model.attention_batch import AttentionBatch, PagedRows


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

    ``queries`` are contiguous. The batch needs ``paged``.
    """
    assert batch.scale is None, "the kernels have a scale of their own"
    assert batch.latent_rank is None, "latent caches have no kernel"
    assert batch.paged is not None, "the kernels read the cache in place"
    if batch.recorder is not None:
        batch.recorder.attending(queries, cache, batch)
    out = torch.empty_like(queries)
    _attend_paged(queries, keys, values, cache, batch.paged, batch.sinks, out)
    return out.view(len(out), -1)


def warm_kernels(
    queries: Tensor, cache: Tensor, windows: Collection[int], max_length: int, has_sinks: bool
) -> None:
    """Compile all variants of the attention kernels that sequences of up to ``max_length`` tokens
    need.

    queries [1, A, D]; cache [2 * K, num_blocks, block_size, D], or with rows of
    ``workers.model.fp8``; it is not written. ``windows``: widths of the model's sliding windows.
    ``has_sinks``: whether the model has attention sinks.
    """
    from workers.cuda.decode_attention import decode, num_splits
    from workers.cuda.prefill_attention import prefill

    out, blocks = torch.empty_like(queries), torch.zeros(2, dtype=torch.int32, device=cache.device)
    tables, lengths = blocks[:1].view(1, 1), torch.ones_like(blocks[:1])
    first_rows = torch.arange(2, dtype=torch.int32, device=cache.device)
    sinks = torch.zeros(queries.shape[1], device=cache.device) if has_sinks else None
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
    is_fp8 = cache.dtype == fp8.ROW_DTYPE
    may_be_plain = not (window or sinks is not None or is_fp8 or queries.dtype == torch.float32)
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
