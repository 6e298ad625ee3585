"""Attention over paged keys and values: SDPA for prompt chunks, batched products for decodes.

A layer's cache is [2 * num_kv_heads, num_blocks, block_size, D], keys before values; one of
``fp8.ROW_DTYPE`` has rows of ``workers.model.fp8`` in place of the D elements. A latent cache
(``AttentionBatch.latent_rank``) is [1, num_blocks, block_size, D]: keys, which begin with the
values. Gathering
blocks along its second dim leaves each head's keys of each sequence in one piece, which is what
makes the batched products fast. The blocks of a few sequences at a time are gathered into a
workspace: in fresh memory, page faults cost more than the products. For 32 sequences of 192 tokens,
8 heads of 64, bfloat16 on one busy core of an AMD EPYC: SDPA over [B, L, heads, D] 10 ms, products
in fresh memory 15 ms, in a workspace 4.0 ms, in pieces of 3 MB 2.3 ms (1024 tokens: 83, 27 and 19
ms).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from workers.model import fp8
from workers.model.compute_threads import ComputeThreads
from workers.native.half import E4M3, BatchFields
from workers.native.panels import DTYPES

PIECE_BYTES = 3 * 1024 * 1024
"""Keys and values that decode rows on a CPU gather at a time."""
GPU_PIECE_BYTES = 256 * 1024 * 1024
"""The same on a GPU, where a cache cannot be read in place: with the rows' keys in float32 it has
three times as much."""


class Workspace:
    """Scratch memory of one thread that grows to the largest request and is kept."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._gathered = torch.empty(0, dtype=dtype, device=device)
        self._keys = torch.empty(0, dtype=torch.float32, device=device)

    def gather(self, cache: Tensor, blocks: Tensor) -> Tensor:
        """``cache.index_select(1, blocks)``, decoded; valid until the next call."""
        if cache.dtype == fp8.ROW_DTYPE:
            return fp8.decode(cache.index_select(1, blocks), self._dtype)
        shape = (cache.shape[0], len(blocks), *cache.shape[2:])
        numel = math.prod(shape)
        if self._gathered.numel() < numel:
            self._gathered = cache.new_empty(numel)
        return torch.index_select(cache, 1, blocks, out=self._gathered[:numel].view(shape))

    def float32(self, keys: Tensor) -> Tensor:
        """``keys.float()``, valid until the next call."""
        if keys.dtype == torch.float32:
            return keys
        if self._keys.numel() < keys.numel():
            self._keys = torch.empty(keys.numel(), dtype=torch.float32, device=keys.device)
        return self._keys[: keys.numel()].view(keys.shape).copy_(keys)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Neighbouring decode rows whose sequences have about the same length."""

    first: int
    last: int
    """One past the last row."""
    blocks: Tensor
    """[rows * blocks_per_row] int64: block tables, padded with the null block."""
    visible: Tensor
    """[rows, blocks_per_row * block_size] bool: True where a row attends; see ``decode_mask``."""
    window: int | None = None
    """Positions to which a row attends, its own and those before it; None: all."""

    @property
    def lengths(self) -> Tensor:
        """[rows] int64: keys up to each row's own."""
        if self.window is None:
            return self.visible.sum(1)
        ends = torch.arange(1, self.visible.shape[1] + 1, device=self.visible.device)
        return (self.visible * ends).amax(1)

    def within(self, window: int) -> DecodeGroup:
        """The same rows in a layer with a sliding window."""
        positions = torch.arange(self.visible.shape[1], device=self.visible.device)
        is_inside = positions >= self.lengths.unsqueeze(1) - window
        return replace(self, visible=self.visible & is_inside, window=window)

    @property
    def cost(self) -> int:
        """Pairs of rows and keys."""
        return self.visible.numel()


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Neighbouring rows of one sequence."""

    first: int
    last: int
    """One past the last row."""
    length: int
    """Keys that the chunk's last row attends to, its own included."""
    blocks: Tensor
    """[num_blocks] int64 that hold them."""
    visible: Tensor | None
    """[rows, length] bool: True where a row attends; None: the chunk begins its sequence, plain
    causal. See ``chunk_mask``."""
    window: int | None = None
    """Positions to which a row attends, its own and those before it; None: all."""

    def within(self, window: int) -> PrefillChunk:
        """The same rows in a layer with a sliding window."""
        if self.length <= window:
            return replace(self, window=window)
        start, device = self.length - (self.last - self.first), self.blocks.device
        own = torch.arange(start, self.length, device=device).unsqueeze(1)
        positions = torch.arange(self.length, device=device)
        visible = (positions <= own) & (positions > own - window)
        return replace(self, visible=visible, window=window)

    @property
    def cost(self) -> int:
        """Pairs of rows and keys."""
        return (self.last - self.first) * self.length


class Recorder(Protocol):
    """Observes the inside of a forward pass."""

    def hidden(self, state: Tensor) -> None:
        """Embeddings, then after each layer but the last, then after the final norm: [T, H]."""

    def router(self, bank: int, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        """A bank's router: logits [T, E], topk_ids [T, k], topk_weights [T, k]."""

    def attending(self, queries: Tensor, cache: Tensor, batch: AttentionBatch) -> None:
        """A layer's queries [T, A, D]; the rows' keys and values are in the layer's cache."""


@dataclass(frozen=True, slots=True)
class RowChunks:
    """The rows of a batch for native kernels: neighbouring rows of a sequence are one chunk."""

    num_rows: int
    """In all chunks."""
    places: Tensor
    """[chunks, 4] int64: first row, rows, position of the first row in its sequence, address of the
    sequence's block table."""
    tables: NDArray[np.int32]
    """The memory of the block tables, which must not change while the batch is used."""
    max_length: int
    """Keys of the longest sequence, those of its last row included."""

    def fields(
        self, cos: Tensor, sin: Tensor, cache: Tensor, *, waves_by_position: bool = False
    ) -> BatchFields:
        """The batch in C. ``Rope.rows`` [T, 1, D] or ``Rope.waves_by_position``, which must outlive
        it, as this must; ``cache`` is that of any layer."""
        assert len(cos) >= self.max_length or not waves_by_position, f"{len(cos)} positions"
        return BatchFields(
            num_rows=self.num_rows,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            wave_stride=cos.stride(0),
            waves_by_position=waves_by_position,
            chunks=self.places.data_ptr(),
            num_chunks=len(self.places),
            max_length=self.max_length,
            num_blocks=cache.shape[1],
            block_size=cache.shape[2],
            cache_dtype=E4M3 if cache.dtype == fp8.ROW_DTYPE else DTYPES.index(cache.dtype),
        )


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The rows of a batch for kernels on a GPU that read the cache in place: decodes come first."""

    tables: Tensor
    """[sequences, max_blocks] int32: what stands behind a sequence's blocks is not read."""
    lengths: Tensor
    """[sequences] int32: keys up to the last row of each, its own included."""
    first_rows: Tensor
    """[sequences + 1] int32: where the rows of each begin."""
    num_decodes: int
    """Sequences of a single row."""
    chunks: tuple[tuple[int, int, int], ...]
    """(first row, one past the last, keys up to it) of the other sequences."""
    window: int | None = None
    """Positions to which a row attends, its own and those before it; None: all."""


@dataclass(frozen=True, slots=True)
class StateRun:
    """Neighbouring rows of one sequence, between two of its recurrent states."""

    first: int
    last: int
    """One past the last row."""
    read: int
    """Slot of the state before the first row."""
    write: int
    """Slot of the state after the last one."""


@dataclass(frozen=True, slots=True)
class StateRows:
    """Which recurrent states the rows of a batch read and write, in the layers that have them.

    Runs are in the order of rows. A run may read what one before it has written.
    """

    runs: tuple[StateRun, ...]
    places: Tensor
    """[runs, 4] int64 on the CPU: the same numbers, for native kernels."""
    chains: Tensor
    """[sequences + 1] int64 on the CPU: where the runs of each sequence begin."""
    num_decodes: int
    """The first runs, of a single row and of different sequences."""
    decode_slots: Tensor
    """[2, num_decodes] int64 on the model's device: slots that they read, and that they write."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the rows of a batch write, and what they read."""

    slot_mapping: Tensor
    """[T] int64: cache slot (block * block_size + offset) of each row."""
    decodes: tuple[DecodeGroup, ...]
    """Rows [0, d) of the batch."""
    prefills: tuple[PrefillChunk, ...]
    """Rows [d, T)."""
    workspaces: tuple[Workspace, ...]
    """Scratch memory of each compute thread."""
    compute_threads: ComputeThreads
    recorder: Recorder | None = None
    chunks: RowChunks | None = None
    """The same rows for native kernels, which read neither ``decodes`` nor ``prefills``."""
    paged: PagedRows | None = None
    """The same rows for kernels on a GPU, which read neither ``decodes`` nor ``prefills``."""
    sinks: Tensor | None = None
    """[A] float32: attention sinks of a layer, scores without a value, which take their share of
    the weights; None: it has none."""
    scale: float | None = None
    """Of a layer's scores; None: D ** -0.5."""
    latent_rank: int | None = None
    """A layer's only key head has its values in the first so many elements of the keys; None: they
    are apart."""
    states: StateRows | None = None
    """The same rows in layers with a recurrent state; None: the model has no such layers."""

    def scale_of(self, dim: int) -> float:
        """Of the scores of queries with D elements."""
        return dim**-0.5 if self.scale is None else self.scale

    def num_kv_heads(self, cache: Tensor) -> int:
        """K: key heads of a layer's cache."""
        return cache.shape[0] // 2 if self.latent_rank is None else 1

    def keys_values(self, found: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
        """Gathered blocks of a cache as keys of a shape [.., D], and values like them."""
        if self.latent_rank is None:
            keys, values = found.view(2, *shape)
            return keys, values
        keys = found.view(shape)
        return keys, keys[..., : self.latent_rank]

    def within(self, window: int) -> AttentionBatch:
        """The same rows in a layer where each attends to ``window`` positions, its own included."""
        return replace(
            self,
            decodes=tuple(group.within(window) for group in self.decodes),
            prefills=tuple(chunk.within(window) for chunk in self.prefills),
            paged=None if self.paged is None else replace(self.paged, window=window),
        )


def decode_mask(lengths: Tensor, width: int) -> Tensor:
    """``DecodeGroup.visible`` of rows with [rows] int64 keys each, padded to ``width``."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def chunk_mask(start: int, num_rows: int, device: torch.device) -> Tensor | None:
    """``PrefillChunk.visible`` of rows start .. start + num_rows - 1 of a sequence."""
    if start == 0:
        return None
    rows = torch.arange(start, start + num_rows, device=device)
    return torch.arange(start + num_rows, device=device) <= rows.unsqueeze(1)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor | None, cache: Tensor, batch: AttentionBatch
) -> Tensor:
    """Write the rows' keys and values, and attend: queries [T, A, D] -> [T, A * V].

    keys [T, K, D] and values [T, K, V], with V = D but in a latent cache, where there are no values
    to write; A is a multiple of K, key head j serves query heads j * (A / K) .. (j + 1) * (A / K)
    - 1.
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
    """Put keys and values [T, K, D], or keys alone, into their cache slots [T]."""
    slots, num_kv_heads = cache.view(len(cache), -1, cache.shape[3]), keys.shape[1]
    for rows, place in ((keys, slots[:num_kv_heads]), (values, slots[num_kv_heads:])):
        if rows is not None:
            stored = fp8.encode(rows) if cache.dtype == fp8.ROW_DTYPE else rows
            place.index_copy_(1, slot_mapping, stored.transpose(0, 1))


def _decode(
    queries: Tensor, cache: Tensor, group: DecodeGroup, space: Workspace, batch: AttentionBatch
) -> Tensor:
    """[rows, A * V]. Scores and softmax in float32, the weights rounded to the model dtype."""
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
    """[rows, A * D]."""
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
"""Of prompt rows for which SDPA has no form: in memory at a time."""


def _prefill_by_scores(
    queries: Tensor, cache: Tensor, chunk: PrefillChunk, space: Workspace, batch: AttentionBatch
) -> Tensor:
    """[rows, A * V]: SDPA has neither sinks nor values that are narrower than keys."""
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
    """Weights of scores [K, rows, A / K, keys] float32, beside those of nothing where it has a
    score, see ``AttentionBatch.sinks``."""
    if sinks is None:
        return torch.softmax(scores, -1)
    own = sinks.view(len(scores), 1, -1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores, own), -1), -1)[..., :-1]


def attention_map(
    queries: Tensor, cache: Tensor, chunk: PrefillChunk, batch: AttentionBatch
) -> Tensor:
    """Softmax of a chunk's scores: [K, A / K, rows, length] float32, 0 where a row does not attend.

    queries [T, A, D]; the keys are in the cache; ``batch`` is that of the layer.
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


def group_size(num_blocks: int) -> int:
    """Blocks that a decode row of ``num_blocks`` is padded to: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..

    It depends on the row alone, so the shape of a row's products does not depend on the batch.
    """
    power = 1 << max(num_blocks - 1, 0).bit_length()
    middle = power * 3 // 4
    return middle if num_blocks <= middle and power >= 4 else power


def runs(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """(first, last) of runs of equal neighbours that sum to at most ``limit``, or of a single one.

    sizes [8, 8, 8, 12], limit 20 -> [(0, 2), (2, 3), (3, 4)]
    """
    found: list[tuple[int, int]] = []
    first = 0
    for i in range(1, len(sizes) + 1):
        is_same = i < len(sizes) and sizes[i] == sizes[first]
        if not is_same or (i - first + 1) * sizes[first] > limit:
            found.append((first, i))
            first = i
    return found if sizes else []
