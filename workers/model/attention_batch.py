"""Cache slots that the rows of a micro-batch write, and the keys and states that they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.model import fp8
from workers.model.compute_threads import ComputeThreads
from workers.model.state_runs import StateRun
from workers.native.attention_sublayer import E4M3, BatchFields
from workers.native.panels import DTYPES

PIECE_BYTES = 3 * 1024 * 1024
"""Maximum bytes of keys and values, or of recurrent states, that a CPU copies and computes at a
time, but at least those of one sequence or head."""
GPU_PIECE_BYTES = 256 * 1024 * 1024
"""Like ``PIECE_BYTES``, on a GPU where kernels cannot read the KV cache in place. Copied keys may
also be converted to float32, so that up to three times this memory is in use."""


class Workspace:
    """Scratch memory of one compute thread for copied keys and values; grows to the largest size
    needed so far."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._gathered = torch.empty(0, dtype=dtype, device=device)
        self._keys = torch.empty(0, dtype=torch.float32, device=device)

    def gather(self, cache: Tensor, blocks: Tensor) -> Tensor:
        """Return blocks of a KV cache, ``cache.index_select(1, blocks)``, dequantized if the cache
        is fp8. The result is valid until the next call."""
        if cache.dtype == fp8.ROW_DTYPE:
            return fp8.decode(cache.index_select(1, blocks), self._dtype)
        shape = (cache.shape[0], len(blocks), *cache.shape[2:])
        numel = math.prod(shape)
        if self._gathered.numel() < numel:
            self._gathered = cache.new_empty(numel)
        return torch.index_select(cache, 1, blocks, out=self._gathered[:numel].view(shape))

    def float32(self, keys: Tensor) -> Tensor:
        """Return ``keys.float()``, valid until the next call; float32 keys are not copied."""
        if keys.dtype == torch.float32:
            return keys
        if self._keys.numel() < keys.numel():
            self._keys = torch.empty(keys.numel(), dtype=torch.float32, device=keys.device)
        return self._keys[: keys.numel()].view(keys.shape).copy_(keys)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Consecutive decode rows that are computed together: their sequences have similar lengths."""

    first: int
    last: int
    """One past the last row."""
    blocks: Tensor
    """[rows * blocks_per_row] int64: block tables of the rows, each padded with the null block."""
    visible: Tensor
    """[rows, blocks_per_row * block_size] bool: True where a row attends; see ``decode_mask``."""
    window: int | None = None
    """Maximum number of positions that a row attends to: its own and the nearest ones before it.
    None: all positions up to its own."""

    @property
    def lengths(self) -> Tensor:
        """[rows] int64: number of keys up to and including each row's own."""
        if self.window is None:
            return self.visible.sum(1)
        ends = torch.arange(1, self.visible.shape[1] + 1, device=self.visible.device)
        return (self.visible * ends).amax(1)

    def within(self, window: int) -> DecodeGroup:
        """Return a copy of the group for a layer with a sliding window of ``window`` positions."""
        positions = torch.arange(self.visible.shape[1], device=self.visible.device)
        is_inside = positions >= self.lengths.unsqueeze(1) - window
        return replace(self, visible=self.visible & is_inside, window=window)

    @property
    def cost(self) -> int:
        """Number of (row, key) pairs, including padding: a measure of computing time."""
        return self.visible.numel()


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive rows of one sequence, such as a chunk of a prompt."""

    first: int
    last: int
    """One past the last row."""
    length: int
    """Number of keys of the sequence up to and including the key of the chunk's last row."""
    blocks: Tensor
    """[num_blocks] int64: block numbers of the sequence's keys, in order."""
    visible: Tensor | None
    """[rows, length] bool: True where a row attends; see ``chunk_mask``. None: the chunk begins its
    sequence, so the mask is plain causal."""
    window: int | None = None
    """Maximum number of positions that a row attends to: its own and the nearest ones before it.
    None: all positions up to its own."""

    def within(self, window: int) -> PrefillChunk:
        """Return a copy of the chunk for a layer with a sliding window of ``window`` positions."""
        if self.length <= window:
            return replace(self, window=window)
        start, device = self.length - (self.last - self.first), self.blocks.device
        own = torch.arange(start, self.length, device=device).unsqueeze(1)
        positions = torch.arange(self.length, device=device)
        visible = (positions <= own) & (positions > own - window)
        return replace(self, visible=visible, window=window)

    @property
    def cost(self) -> int:
        """Number of (row, key) pairs: a measure of computing time."""
        return (self.last - self.first) * self.length


class Recorder(Protocol):
    """Interface of an observer of a forward pass: receives hidden states, routing and queries."""

    def hidden(self, state: Tensor) -> None:
        """Receive hidden states [T, H]: first the embeddings, then the output of each layer except
        the last, then the output of the final norm."""

    def router(self, bank: int, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Receive a router's logits [T, E], and ids and weights [T, k] of the selected experts."""

    def attending(self, queries: Tensor, cache: Tensor, batch: AttentionBatch) -> None:
        """Receive a layer's queries [T, A, D]. The keys and values of these T rows are already in
        ``cache``, the layer's KV cache."""


@dataclass(frozen=True, slots=True)
class RowChunks:
    """Rows of a batch, as native kernels read them: consecutive rows of a sequence are a chunk."""

    num_rows: int
    """Number of rows in all chunks."""
    places: Tensor
    """[chunks, 4] int64: first row, rows, position of the first row in its sequence, address of the
    sequence's block table."""
    tables: NDArray[np.int32]
    """Memory of the block tables, which must not change while the batch is in use."""
    max_length: int
    """Number of keys of the longest sequence, including that of its last row."""

    def fields(
        self, cos: Tensor, sin: Tensor, cache: Tensor, *, waves_by_position: bool = False
    ) -> BatchFields:
        """Return the batch as a C struct that points into this object and into ``cos`` and ``sin``.

        ``cos`` and ``sin``: from ``Rope.rows`` [T, 1, D] or, if ``waves_by_position``, from
        ``Rope.waves_by_position`` [positions, 1, D].
        ``cache``: of any layer with keys and values, to describe its shape.
        """
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
    """Rows of a batch for GPU kernels that read the KV cache in place; decode rows are first."""

    tables: Tensor
    """[sequences, max_blocks] int32: block table of each sequence; entries after its last block are
    not read."""
    lengths: Tensor
    """[sequences] int32: number of keys of each sequence, including that of its last row."""
    first_rows: Tensor
    """[sequences + 1] int32: first row of each sequence, then the number of rows."""
    num_decodes: int
    """Number of sequences with a single row."""
    chunks: tuple[tuple[int, int, int], ...]
    """(first row, one past the last row, keys up to the last row) of each multi-row sequence."""
    window: int | None = None
    """Maximum number of positions that a row attends to: its own and the nearest ones before it.
    None: all positions up to its own."""


@dataclass(frozen=True, slots=True)
class StateRows:
    """Recurrent states that the rows of a batch read and write, in layers that have states.

    A run (``StateRun``) is consecutive rows of one sequence. A run reads one state and writes one
    state, and may read the state that an earlier run writes. Runs are in row order.
    """

    runs: tuple[StateRun, ...]
    places: Tensor
    """[runs, 4] int64 on the CPU: fields of each ``StateRun``, for native kernels."""
    chains: Tensor
    """[sequences + 1] int64 on the CPU: first run of each sequence, then the number of runs."""
    num_decodes: int
    """Number of leading runs that are single rows of different sequences."""
    decode_slots: Tensor
    """[2, num_decodes] int64 on the model's device: state slots that the first ``num_decodes`` runs
    read, and state slots that they write."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Input of attention: KV cache slots that a batch's rows write, and keys that they read."""

    slot_mapping: Tensor
    """[T] int64: KV cache slot (block * block_size + offset) of each row."""
    decodes: tuple[DecodeGroup, ...]
    """Groups of decode rows, the first rows of the batch."""
    prefills: tuple[PrefillChunk, ...]
    """Chunks of prompt rows, which follow the decode rows."""
    workspaces: tuple[Workspace, ...]
    """Scratch memory of each compute thread."""
    compute_threads: ComputeThreads
    recorder: Recorder | None = None
    chunks: RowChunks | None = None
    """The rows for native kernels, which read neither ``decodes`` nor ``prefills``."""
    paged: PagedRows | None = None
    """The rows for GPU kernels, which read neither ``decodes`` nor ``prefills``."""
    sinks: Tensor | None = None
    """[A] float32: attention sinks of a layer, an extra score per head in the softmax that has no
    value; None: no sinks."""
    scale: float | None = None
    """Factor of a layer's attention scores; None: head_dim ** -0.5."""
    latent_rank: int | None = None
    """Number of leading elements of the single key that are also the value, in the KV cache of
    latent attention; None: values are stored separately."""
    states: StateRows | None = None
    """Recurrent states that the rows read and write; None: the model has no recurrent layers."""

    def scale_of(self, dim: int) -> float:
        """Factor of the attention scores of queries with ``dim`` elements."""
        return dim**-0.5 if self.scale is None else self.scale

    def num_kv_heads(self, cache: Tensor) -> int:
        """K: number of key heads in a layer's KV cache."""
        return cache.shape[0] // 2 if self.latent_rank is None else 1

    def keys_values(self, found: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
        """Split gathered blocks of a KV cache into keys of ``shape`` [.., D] and values, which have
        ``latent_rank`` elements in latent attention and D elements in other attention."""
        if self.latent_rank is None:
            keys, values = found.view(2, *shape)
            return keys, values
        keys = found.view(shape)
        return keys, keys[..., : self.latent_rank]

    def within(self, window: int) -> AttentionBatch:
        """Return a copy of the batch for a layer with a sliding window of ``window`` positions."""
        return replace(
            self,
            decodes=tuple(group.within(window) for group in self.decodes),
            prefills=tuple(chunk.within(window) for chunk in self.prefills),
            paged=None if self.paged is None else replace(self.paged, window=window),
        )


def decode_mask(lengths: Tensor, width: int) -> Tensor:
    """Return ``DecodeGroup.visible``, a mask [rows, width] bool that is True at the first
    ``lengths[i]`` positions of row i. ``lengths``: [rows] int64."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def chunk_mask(start: int, num_rows: int, device: torch.device) -> Tensor | None:
    """Return ``PrefillChunk.visible``, the causal mask [num_rows, start + num_rows] of rows
    ``start`` to ``start`` + ``num_rows`` - 1 of a sequence; None if ``start`` is 0."""
    if start == 0:
        return None
    rows = torch.arange(start, start + num_rows, device=device)
    return torch.arange(start + num_rows, device=device) <= rows.unsqueeze(1)


def group_size(num_blocks: int) -> int:
    """Number of blocks to which a decode row of ``num_blocks`` is padded: 1, 2, 3, 4, 6, 8, 12, 16,
    24, ..

    The result depends on the row alone, so the shape of a row's products is independent of the
    batch.
    """
    power = 1 << max(num_blocks - 1, 0).bit_length()
    middle = power * 3 // 4
    return middle if num_blocks <= middle and power >= 4 else power


def runs(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Split ``sizes`` into ranges (first, one past the last index) of equal neighbours with a sum
    of at most ``limit``. A range of one element may exceed the limit.

    Example: sizes [8, 8, 8, 12], limit 20 -> [(0, 2), (2, 3), (3, 4)].
    """
    found: list[tuple[int, int]] = []
    first = 0
    for i in range(1, len(sizes) + 1):
        is_same = i < len(sizes) and sizes[i] == sizes[first]
        if not is_same or (i - first + 1) * sizes[first] > limit:
            found.append((first, i))
            first = i
    return found if sizes else []
