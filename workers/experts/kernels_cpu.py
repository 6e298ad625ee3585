"""Expert kernels on the CPU: one is chosen per bank by the size of its experts.

Milliseconds for one layer of 64 experts, top-8, one thread of an AMD EPYC (avx512_bf16), torch
2.13, bfloat16, at 1 / 8 / 32 rows (pairs are rows * 8):

    hidden x inner    loop plain         loop packed        padded bmm, all    bmm, gathered
    512 x 256         1.1 / 5.8 / 9.7    0.7 / 3.9 / 5.6    5.8 / 6.4 / 7.7    1.5 / 9.4 / 23.0
    256 x 128         0.5 / 2.9 / 4.6    0.4 / 2.1 / 3.2    1.7 / 1.9 / 2.4    0.5 / 2.2 / 3.6
    256 x 64          0.4 / 3.2 / 3.5    0.4 / 2.5 / 2.8    0.8 / 1.2 / 1.2    0.3 / 1.6 / 1.9
    128 x 32          0.3 / 1.5 / 2.8    0.3 / 1.5 / 2.4    0.2 / 0.3 / 0.4    0.2 / 0.5 / 0.7

and in float32: 512 x 256 packed 1.2 / 6.4 / 8.7, bmm 9.8 / 15.2 / 17.0; 128 x 32 packed 0.3 / 1.6 /
2.4, bmm 0.2 / 0.4 / 0.6. So: packed from 64 Ki elements of a gate-and-up matrix on, else bmm, and
there gathered while at most a quarter of the slots has work, and a loop where padding would cost
more than it saves. ``torch._grouped_mm`` was never best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from workers.experts.loops import packed_products, plain_products
from workers.experts.stacked import StackedWeights
from workers.lanes import Lanes
from workers.layers import Gate, can_pack, pack, packed_linear, swiglu, unpack

PACKED_MIN_ELEMENTS = 64 * 1024
"""Elements of an exchange's first matrix from which on a call per expert pays."""
_WIDE_ROWS = 16
"""Rows per used expert from which on the loop takes all matrices of an expert in turn."""
_CALL_ROWS = 16
"""Rows whose products take as long as a call and the reading of an expert's weights."""
_FEW_PAIRS = 16
"""Pairs up to which it is worth a look whether each has a slot of its own: nothing to sort then."""
_FEW_SLOTS = 4
"""Slots per used one, or per pair, from which on the weights in use are gathered."""
_MAX_PADDING = 4
"""Padded rows per pair above which the padded product gives way to a loop."""


class PackedExperts:
    """One call per expert that has rows, weights in oneDNN's layout (plain where it has none)."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        lanes: Lanes,
        gate: Gate = swiglu,
    ) -> None:
        """shapes: [out, in] of each matrix of an expert: one, or gate-over-up and down."""
        self._lanes = lanes
        self._gate = gate
        self._shapes = tuple(shapes)
        self._dtype = dtype
        self._weights: list[list[Tensor]] = [[] for _ in shapes]
        self._is_packed = can_pack(torch.empty(shapes[0], dtype=dtype, device="cpu"))

    def resize(self, num_slots: int) -> None:
        """See ``ExpertKernel``; new slots are empty and take no memory."""
        empty = torch.empty(0, dtype=self._dtype)
        self._weights = [
            old[:num_slots] + [empty] * (num_slots - len(old)) for old in self._weights
        ]

    def store(self, slot: int, matrix: int, weight: Tensor) -> None:
        """Copy one matrix of one expert."""
        self._weights[matrix][slot] = pack(weight) if self._is_packed else weight.clone()

    def read(self, slot: int, matrix: int) -> Tensor:
        """A copy of one matrix of one expert, as it was stored."""
        weight = self._weights[matrix][slot]
        return unpack(weight) if weight.layout is not torch.strided else weight.clone()

    def clear(self, slot: int) -> None:
        """Free a slot's memory."""
        for weights in self._weights:
            weights[slot] = torch.empty(0, dtype=self._dtype)

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        """Outputs [P, out] of pairs; see ``ExpertBank.compute``."""
        product = _Product(self._weights, self._gate, self._is_packed)
        if len(pair_slot) <= _FEW_PAIRS and len(set(slots := pair_slot.tolist())) == len(slots):
            rows = inputs.index_select(0, pair_input)
            return _pair_by_pair(rows, slots, product, self._lanes)
        order = pair_slot.argsort(stable=True)
        counts = torch.bincount(pair_slot)
        return _loop(inputs, pair_input, order, counts, product, self._lanes)


class PaddedExperts(StackedWeights):
    """One batched product over all experts, rows padded to the busiest one's."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        lanes: Lanes,
        gate: Gate = swiglu,
    ) -> None:
        """shapes: [out, in] of each matrix of an expert: one, or gate-over-up and down."""
        super().__init__(shapes, dtype, None)
        self._lanes = lanes
        self._gate = gate

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        """Outputs [P, out] of pairs; see ``ExpertBank.compute``."""
        weights = self._weights
        if len(pair_slot) * _FEW_SLOTS <= len(weights[0]):
            return self._gathered(weights, inputs.index_select(0, pair_input), pair_slot)
        order = pair_slot.argsort(stable=True)
        counts = torch.bincount(pair_slot, minlength=len(weights[0]))
        used = counts.nonzero().squeeze(1)
        height = int(counts.max())
        if len(used) * height > _MAX_PADDING * max(len(order), len(counts)):
            product = _Product(weights, self._gate, is_packed=False)
            return _loop(inputs, pair_input, order, counts, product, self._lanes)
        rows = inputs.index_select(0, pair_input[order])
        rows = self._padded(weights, rows, pair_slot[order], counts, used, height)
        return torch.empty_like(rows).index_copy_(0, order, rows)

    def _gathered(self, weights: Sequence[Tensor], rows: Tensor, slots: Tensor) -> Tensor:
        """rows [P, in] -> [P, out]: weights are gathered for each pair, nothing is sorted."""
        padded = rows.unsqueeze(1)
        for matrix, weight in enumerate(weights):
            if matrix == 1:
                padded = self._gate(padded)
            padded = torch.bmm(padded, weight.index_select(0, slots).transpose(1, 2))
        return padded.squeeze(1)

    def _padded(
        self,
        weights: Sequence[Tensor],
        rows: Tensor,
        slots: Tensor,
        counts: Tensor,
        used: Tensor,
        height: int,
    ) -> Tensor:
        """rows [P, in] sorted by their slots -> [P, out]."""
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(rows)) - starts[slots]
        if len(used) * _FEW_SLOTS <= len(counts):
            slots = torch.searchsorted(used, slots)
            weights = [w[used] for w in weights]
        place += slots * height
        padded = rows.new_zeros(len(weights[0]) * height, rows.shape[1])
        padded[place] = rows
        padded = padded.view(len(weights[0]), height, -1)
        for matrix, weight in enumerate(weights):
            if matrix == 1:
                padded = self._gate(padded)
            padded = torch.bmm(padded, weight.transpose(1, 2))
        return padded.view(-1, padded.shape[2])[place]


@dataclass(frozen=True, slots=True)
class _Product:
    """How experts' rows are computed."""

    weights: Sequence[Sequence[Tensor] | Tensor]
    """[matrix][slot]."""
    gate: Gate
    """Between the first matrix and the second."""
    is_packed: bool
    """The weights are in oneDNN's layout."""

    def of_one(self, rows: Tensor, slot: int) -> Tensor:
        """rows [R, in] of one slot -> [R, out]."""
        linear = packed_linear if self.is_packed else functional.linear
        for matrix, weights in enumerate(self.weights):
            rows = linear(self.gate(rows) if matrix else rows, weights[slot])
        return rows

    def of_many(self, rows: Tensor, slots: list[int], sizes: list[int]) -> Tensor:
        """rows [R, in]: ``sizes[0]`` of ``slots[0]``, and so on -> [R, out]."""
        products = packed_products if self.is_packed else plain_products
        for matrix, weights in enumerate(self.weights):
            own = [weights[slot] for slot in slots]
            rows = products(self.gate(rows) if matrix else rows, sizes, own)
        return rows


def _pair_by_pair(rows: Tensor, slots: list[int], product: _Product, lanes: Lanes) -> Tensor:
    """rows [P, in], each for another slot -> [P, out]: nothing is sorted."""
    shares = [slice(*share) for share in lanes.split([1.0] * len(slots))]
    tasks = [partial(product.of_many, rows[s], slots[s], [1] * len(slots[s])) for s in shares]
    parts = lanes.run(tasks)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _loop(
    inputs: Tensor,
    pair_input: Tensor,
    order: Tensor,
    counts: Tensor,
    product: _Product,
    lanes: Lanes,
) -> Tensor:
    """Outputs [P, out] of pairs with a product per used slot and matrix.

    ``order`` [P] sorts the pairs by slot, ``counts`` [slots] are the pairs of each.
    """
    work = [(slot, count) for slot, count in enumerate(counts.tolist()) if count]
    output = inputs.new_empty(len(order), product.weights[-1][work[0][0]].shape[0])
    sources = pair_input[order]
    compute = _by_matrix if len(order) < _WIDE_ROWS * len(work) else _by_slot

    def share(first: int, last: int, first_row: int, last_row: int) -> None:
        places, rows = order[first_row:last_row], sources[first_row:last_row]
        compute(inputs, rows, places, work[first:last], product, output)

    tasks = []
    row = 0
    for first, last in lanes.split([_CALL_ROWS + count for _, count in work]):
        end = row + sum(count for _, count in work[first:last])
        tasks.append(partial(share, first, last, row, end))
        row = end
    lanes.run(tasks)
    return output


def _by_slot(
    inputs: Tensor,
    sources: Tensor,
    places: Tensor,
    work: Sequence[tuple[int, int]],
    product: _Product,
    output: Tensor,
) -> None:
    """Slot after slot: what an expert makes of its rows stays in the core's own cache."""
    sizes = [count for _, count in work]
    for (slot, _), source, place in zip(
        work, torch.split(sources, sizes), torch.split(places, sizes), strict=True
    ):
        output.index_copy_(0, place, product.of_one(inputs.index_select(0, source), slot))


def _by_matrix(
    inputs: Tensor,
    sources: Tensor,
    places: Tensor,
    work: Sequence[tuple[int, int]],
    product: _Product,
    output: Tensor,
) -> None:
    """Matrix after matrix: fewest calls for few rows each."""
    slots, sizes = [slot for slot, _ in work], [count for _, count in work]
    rows = product.of_many(inputs.index_select(0, sources), slots, sizes)
    output.index_copy_(0, places, rows)
