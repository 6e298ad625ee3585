"""Builds the micro-batches of a step: the tensors that the model reads, from planned rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from workers.inspection.recorder import BatchRecorder, Capture
from workers.kv.block_tables import BlockTables
from workers.kv.cache import KVCache
from workers.lora.loaded import LoadedAdapters
from workers.model.attention_batch import (
    AttentionBatch,
    DecodeGroup,
    PagedRows,
    PrefillChunk,
    RowChunks,
    StateRows,
    chunk_mask,
    decode_mask,
    group_size,
    runs,
)
from workers.model.host_copies import to_device
from workers.model.layers import ModelInputs
from workers.model.state_runs import StateRun
from workers.requests.sequence import SequenceState
from workers.scheduling.step_plan import PlannedRows, StepPlan

_KEY_STEP = np.uint64(0x9E3779B97F4A7C15)
_KEY_MASK = np.uint64((1 << 63) - 1)


def batch_order(planned: PlannedRows) -> int:
    """Sort key of a plan entry in a batch: decodes first, by class of KV length, then prompt rows.

    A stable sort by this key keeps the order of the prompts.
    """
    return group_size(len(planned.sequence.blocks)) if planned.is_decode else sys.maxsize


def split_rows(
    planned: Sequence[PlannedRows], num_first: int
) -> tuple[list[PlannedRows], list[PlannedRows]]:
    """Split plan entries into the first ``num_first`` rows and the rest.

    A prompt chunk may be divided into two entries.
    """
    first: list[PlannedRows] = []
    second: list[PlannedRows] = []
    left = num_first
    for rows in planned:
        head = min(left, rows.count)
        left -= head
        if head == rows.count:
            first.append(rows)
            continue
        if head:
            first.append(replace(rows, count=head))
        second.append(replace(rows, first=rows.first + head, count=rows.count - head))
    return first, second


def num_decodes(planned: Sequence[PlannedRows]) -> int:
    """Number of decode rows; the batch order puts them before all prompt rows."""
    return sum(rows.is_decode for rows in planned)


class PlannedBatchRows:
    """``BatchRows`` of one micro-batch, made from planned rows.

    The tensors are computed on first use, as few steps read them.
    """

    def __init__(self, planned: Sequence[PlannedRows], device: torch.device) -> None:
        """``planned`` must be in ``batch_order``."""
        self._planned, self._device = planned, device

    @property
    def is_inspected(self) -> bool:
        """Whether the host reads values of the rows between the layers."""
        return needs_captures(self._planned)

    @cached_property
    def is_prefill(self) -> Tensor:
        """Whether each row belongs to a prompt, [T] bool."""
        rows = np.arange(sum(rows.count for rows in self._planned))
        return to_device(rows >= num_decodes(self._planned), self._device)

    @cached_property
    def row_key(self) -> Tensor:
        """Hash of (request, choice, position) of each row, [T] int64, which selects the expert
        copies of a prompt row."""
        keys = [rows.sequence.key for rows in self._planned]
        positions, by_row = _expand_to_rows(self._planned, keys)
        named = by_row.view(np.uint64) ^ positions.view(np.uint64) * _KEY_STEP  # modulo 2 ** 64
        return to_device((named & _KEY_MASK).view(np.int64), self._device)


class MicroBatch:
    """The input tensors of one micro-batch, built on the CPU and copied to the device at once.

    Args:
        planned: rows of the micro-batch in ``batch_order``.
        cache: the KV cache that the rows read and write.
        tables: block tables of the sequences.
        device: device of the model.
        is_native: whether native kernels read the batch; see ``AttentionBatch.chunks``.
        adapters: all loaded LoRA adapters, among them the adapters of the rows.
    """

    def __init__(
        self,
        planned: Sequence[PlannedRows],
        cache: KVCache,
        tables: BlockTables,
        device: torch.device,
        is_native: bool = False,
        adapters: LoadedAdapters | None = None,
    ) -> None:
        self._device = device
        self.captures = _captures(planned)
        """Sequences of requests that ask for internal tensors of the model, with buffers for
        these tensors."""
        decode_rows = num_decodes(planned)
        staging = [*row_columns(planned, tables, cache.block_size)]
        # Attention maps are always computed by torch, which needs prompts as separate chunks.
        is_whole = is_native or cache.is_read_in_place
        in_pieces = () if is_whole and not self.captures else planned
        groups = self._stage_decodes(in_pieces[:decode_rows], cache, tables, staging)
        chunks = in_pieces[decode_rows:]
        for rows in chunks:
            length = rows.first + rows.count
            staging.append(_int64_array(rows.sequence.blocks[: -(-length // cache.block_size)]))
        tensors = _copy_to_device(staging, device)
        tokens, positions, prompt_lengths, slots = (next(tensors) for _ in range(4))
        recorder = BatchRecorder([c for _, c in self.captures]) if self.captures else None
        self.inputs: ModelInputs | None = None
        """Inputs of the model; None if the micro-batch has no rows."""
        if planned:
            decodes = tuple(self._decode_group(g, tensors, cache.block_size) for g in groups)
            prefills = tuple(self._chunks(chunks, decode_rows, tensors))
            attention = AttentionBatch(
                slots,
                decodes,
                prefills,
                cache.workspaces,
                cache.compute_threads,
                recorder,
                row_chunks(planned, tables) if is_native else None,
                self._paged(planned, tables) if cache.is_read_in_place else None,
                states=state_rows(planned, decode_rows, device),
            )
            given = tuple(prompt_embedding_rows(planned, device))
            owners = [(rows.sequence.request.adapter, rows.count) for rows in planned]
            own = None if adapters is None else adapters.batch(owners)
            self.inputs = ModelInputs(tokens, positions, prompt_lengths, attention, given, own)

    def _paged(self, planned: Sequence[PlannedRows], tables: BlockTables) -> PagedRows:
        """Copy block tables, lengths and row ranges of all sequences to the device in one copy."""
        ends = np.cumsum([rows.count for rows in planned]).tolist()
        lengths = [rows.first + rows.count for rows in planned]
        width = max(len(rows.sequence.blocks) for rows in planned)
        seats = _int64_array(_seats(planned))
        parts = (tables.array[seats, :width].ravel(), lengths, [0, *ends])
        numbers = np.concatenate(parts, dtype=np.int32)
        sizes = [len(part) for part in parts]
        moved = to_device(numbers, self._device).split_with_sizes(sizes)
        decodes = num_decodes(planned)
        counts = [rows.count for rows in planned]
        spans = zip(ends, counts, lengths, strict=True)
        chunks = tuple((end - count, end, length) for end, count, length in spans)
        return PagedRows(moved[0].view(-1, width), moved[1], moved[2], decodes, chunks[decodes:])

    def _stage_decodes(
        self,
        planned: Sequence[PlannedRows],
        cache: KVCache,
        tables: BlockTables,
        staging: list[NDArray[np.int64]],
    ) -> list[tuple[int, int]]:
        """Append the padded block tables and lengths of each group of decodes to ``staging``;
        returns the row range of each group."""
        num_blocks = [rows.first // cache.block_size + 1 for rows in planned]
        sizes = [group_size(number) for number in num_blocks]
        groups = runs(sizes, cache.blocks_per_piece)
        seats, held = _int64_array(_seats(planned)), _int64_array(num_blocks)
        lengths = _int64_array([rows.first + 1 for rows in planned])
        for first, last in groups:
            known = tables.array[seats[first:last], : sizes[first]]
            is_own = np.arange(known.shape[1]) < held[first:last, None]
            padded = np.full((last - first, sizes[first]), cache.null_block, dtype=np.int64)
            np.copyto(padded[:, : known.shape[1]], known, where=is_own)
            staging += [padded.reshape(-1), lengths[first:last]]
        return groups

    def _decode_group(
        self, group: tuple[int, int], tensors: Iterator[Tensor], block_size: int
    ) -> DecodeGroup:
        first, last = group
        blocks, lengths = next(tensors), next(tensors)
        width = len(blocks) // (last - first) * block_size
        return DecodeGroup(first, last, blocks, decode_mask(lengths, width))

    def _chunks(
        self, planned: Sequence[PlannedRows], first_row: int, tensors: Iterator[Tensor]
    ) -> Iterator[PrefillChunk]:
        for rows in planned:
            last_row, length = first_row + rows.count, rows.first + rows.count
            mask = chunk_mask(rows.first, rows.count, self._device)
            yield PrefillChunk(first_row, last_row, length, next(tensors), mask)
            first_row = last_row


def row_chunks(planned: Sequence[PlannedRows], tables: BlockTables) -> RowChunks:
    """Return the rows of a micro-batch as chunks of consecutive positions, for native kernels."""
    num_rows = 0
    chunks: list[int] = []
    for rows in planned:
        assert rows.sequence.seat is not None, "planned sequences run"
        if rows.drafts and num_rows:  # continues the previous chunk of the same sequence
            chunks[-3] += rows.count
        else:
            chunks += (num_rows, rows.count, rows.first, tables.address(rows.sequence.seat))
        num_rows += rows.count
    return RowChunks(
        num_rows=num_rows,
        places=torch.from_numpy(_int64_array(chunks)).view(-1, 4),
        tables=tables.array,
        max_length=max(rows.first + rows.count for rows in planned),
    )


def state_rows(
    planned: Sequence[PlannedRows], num_decodes: int, device: torch.device
) -> StateRows | None:
    """Return the row ranges whose rows share a recurrent state, decodes first.

    None for a model without recurrent states or a micro-batch without rows.
    """
    if not planned or planned[0].states is None:
        return None
    by_sequence = [*_state_runs(planned)]
    in_order = tuple(run for own in by_sequence for run in own)
    columns = torch.tensor([(run.first, run.last, run.read, run.write) for run in in_order])
    chains = torch.tensor([0, *accumulate(map(len, by_sequence))])
    slots = columns[:num_decodes, 2:].T.contiguous()
    return StateRows(in_order, columns, chains, num_decodes, to_device(slots.numpy(), device))


def _state_runs(planned: Sequence[PlannedRows]) -> Iterator[list[StateRun]]:
    """Yield for each plan entry its ``StateRun`` list, with row indices of the micro-batch."""
    begin = 0
    for rows in planned:
        assert rows.states is not None, "all sequences have states, or none"
        own = rows.states.runs(rows.first, rows.first + rows.count)
        yield [run.moved(begin - rows.first) for run in own]
        begin += rows.count


def prompt_embedding_rows(
    planned: Sequence[PlannedRows], device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, embeddings) for each plan entry with prompt rows given as embeddings."""
    row = 0
    for rows in planned:
        embeds = rows.sequence.request.prompt_embeds
        last = min(rows.first + rows.count, rows.sequence.prompt_length)
        if embeds is not None and rows.first < last:
            yield row, to_device(np.array(embeds.rows(rows.first, last)), device)
        row += rows.count


def needs_captures(planned: Sequence[PlannedRows]) -> bool:
    """Whether a request of the planned rows asks for internal tensors of the model."""
    inspections = (rows.sequence.request.inspection for rows in planned)
    return any(inspection is not None and inspection.needs_captures for inspection in inspections)


def has_adapters(planned: Sequence[PlannedRows]) -> bool:
    """Whether a request of the planned rows uses a LoRA adapter."""
    return any(rows.sequence.request.adapter for rows in planned)


def _captures(planned: Sequence[PlannedRows]) -> list[tuple[SequenceState, Capture]]:
    """Return a capture for each plan entry whose request asks for internal tensors."""
    captures: list[tuple[SequenceState, Capture]] = []
    row = 0
    for rows in planned:
        inspection = rows.sequence.request.inspection
        if inspection is not None and inspection.needs_captures:
            captures.append((rows.sequence, Capture(inspection, rows.first, row, rows.count)))
        row += rows.count
    return captures


def _copy_to_device(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> Iterator[Tensor]:
    """Copy the arrays to the device in one copy; yield a tensor for each array, in order.

    The tensors are views of one tensor.
    """
    joined = to_device(np.concatenate(arrays), device)
    return iter(torch.split(joined, [len(array) for array in arrays]))


def _int64_array(values: Sequence[int | None]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def row_tokens(planned: Sequence[PlannedRows]) -> NDArray[np.int64]:
    """Return the input token id of each planned row, [T] int64."""
    tokens: list[int] = []
    for rows in planned:
        if rows.is_decode:
            tokens.append(rows.drafts[0] if rows.drafts else rows.sequence.output[-1])
        else:
            tokens += rows.sequence.tokens(rows.first, rows.first + rows.count)
    return _int64_array(tokens)


def next_tokens(
    planned: StepPlan, first_row: Sequence[int], drawn: Mapping[SequenceState, Sequence[int]]
) -> NDArray[np.int64]:
    """Return the token that follows the token of each row, [num_rows] int64; 0 if it is unknown.

    ``first_row``: first row of each plan entry. ``drawn``: tokens sampled in the plan's step.
    """
    following = np.zeros(planned.num_rows, dtype=np.int64)
    for rows, row in zip(planned.rows, first_row, strict=False):
        sequence, new = rows.sequence, drawn.get(rows.sequence, ())
        first = rows.first + 1
        known = sequence.tokens(first, min(first + rows.count, sequence.num_tokens))
        tokens = [*known, *new][: rows.count]
        following[row : row + len(tokens)] = tokens
    return following


def row_columns(
    planned: Sequence[PlannedRows], tables: BlockTables, block_size: int
) -> tuple[NDArray[np.int64], ...]:
    """Return the token ids, positions, prompt lengths and KV cache slots of all rows, each [T]
    int64. A cache slot is block * block_size + offset."""
    positions, seats, prompt_lengths = _expand_to_rows(
        planned, _seats(planned), _prompt_lengths(planned)
    )
    blocks, offsets = np.divmod(positions, block_size)
    slots = tables.array[seats, blocks].astype(np.int64) * block_size + offsets
    return row_tokens(planned), positions, prompt_lengths, slots


def positions_and_lengths(planned: Sequence[PlannedRows]) -> NDArray[np.int64]:
    """Return the positions and the prompt lengths of all rows, [2, T] int64."""
    return _expand_to_rows(planned, _prompt_lengths(planned))


def _seats(planned: Sequence[PlannedRows]) -> list[int | None]:
    return [rows.sequence.seat for rows in planned]


def _prompt_lengths(planned: Sequence[PlannedRows]) -> list[int]:
    return [rows.sequence.prompt_length for rows in planned]


def _expand_to_rows(
    planned: Sequence[PlannedRows], *entries: Sequence[int | None]
) -> NDArray[np.int64]:
    """Return the position of each row, then the values of the row's plan entry.

    ``entries``: columns with one value for each plan entry. The result is [1 + len(entries), T].
    """
    columns = np.array([[rows.first for rows in planned], *entries], dtype=np.int64)
    if num_decodes(planned) < len(planned):  # else each entry has one row
        counts = _int64_array([rows.count for rows in planned])
        firsts = np.cumsum(counts) - counts
        columns = np.repeat(columns, counts, axis=1)
        columns[0] += np.arange(columns.shape[1]) - np.repeat(firsts, counts)
    return columns
