"""Expert kernels in torch on the CPU; the size of an exchange's experts selects one of them.

A loop calls one product per expert; bmm is one batched product, over all experts or over gathered
weights. Milliseconds for one layer of 64 experts, top-8, one thread of an AMD EPYC (avx512_bf16),
torch 2.13, bfloat16, at 1 / 8 / 32 rows (pairs are rows * 8):

    hidden x inner    loop plain         loop packed        padded bmm, all    bmm, gathered
    512 x 256         1.1 / 5.8 / 9.7    0.7 / 3.9 / 5.6    5.8 / 6.4 / 7.7    1.5 / 9.4 / 23.0
    256 x 128         0.5 / 2.9 / 4.6    0.4 / 2.1 / 3.2    1.7 / 1.9 / 2.4    0.5 / 2.2 / 3.6
    256 x 64          0.4 / 3.2 / 3.5    0.4 / 2.5 / 2.8    0.8 / 1.2 / 1.2    0.3 / 1.6 / 1.9
    128 x 32          0.3 / 1.5 / 2.8    0.3 / 1.5 / 2.4    0.2 / 0.3 / 0.4    0.2 / 0.5 / 0.7

and in float32: 512 x 256 packed 1.2 / 6.4 / 8.7, bmm 9.8 / 15.2 / 17.0; 128 x 32 packed 0.3 / 1.6 /
2.4, bmm 0.2 / 0.4 / 0.6. Therefore experts with a gate-and-up matrix of at least 64 Ki elements use
the packed loop. Smaller ones use bmm: gathered while at most a quarter of the slots has work, else
padded, or a plain loop if padding costs too much. ``functional.grouped_mm`` was never best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from workers.experts.scripted_products import expert_products
from workers.experts.stacked import StackedWeights, batched_products
from workers.model.compute_threads import ComputeThreads
from workers.model.config import ExchangeSpec
from workers.model.layers import GatedActivation, can_pack, gated_activation
from workers.model.torch_private import pack, unpack
from workers.quantization.matrix import Weight, plain

PACKED_MIN_ELEMENTS = 64 * 1024
"""Minimum number of elements of an exchange's first matrix for which one call per expert is faster
than one batched product of all experts."""
_WIDE_ROWS = 16
"""Minimum mean number of rows per used expert for which the loop computes all products of one
expert before it starts with the next expert."""
_CALL_ROWS = 16
"""Cost of a call that reads one expert's weights, as a number of rows whose products take as
long."""
_FEW_PAIRS = 16
"""Maximum number of pairs for which the kernel checks whether each slot has only one pair. If so,
the pairs are computed without a sort."""
_FEW_SLOTS = 4
"""Minimum number of slots per used slot (or per pair) for which only copies of the used weights are
multiplied, instead of the weights of all slots."""
_MAX_PADDING = 4
"""Maximum number of padded rows per pair (or per slot, if there are more slots than pairs). Above
it, a loop over the experts replaces the padded product."""


class PackedExperts:
    """Expert kernel with one call per expert that has rows; weights have oneDNN's packed layout
    where oneDNN offers one."""

    def __init__(
        self, exchange: ExchangeSpec, dtype: torch.dtype, compute_threads: ComputeThreads
    ) -> None:
        shapes = exchange.matrix_shapes
        self._num_products = len(exchange.product_shapes)
        self._compute_threads = compute_threads
        self._activate = gated_activation(exchange.activation)
        self._dtype = dtype
        self._weights: list[list[Tensor]] = [[] for _ in shapes]
        self._is_packed = can_pack(torch.empty(shapes[0], dtype=dtype, device="cpu"))

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; remaining slots keep their contents, and new slots take no
        memory."""
        empty = torch.empty(0, dtype=self._dtype)
        self._weights = [
            old[:num_slots] + [empty] * (num_slots - len(old)) for old in self._weights
        ]

    def store(self, slot: int, matrix: int, weight: Weight) -> None:
        is_packed, found = self._is_packed and matrix < self._num_products, plain(weight)
        self._weights[matrix][slot] = pack(found) if is_packed else found.clone()

    def read(self, slot: int, matrix: int) -> Tensor:
        weight = self._weights[matrix][slot]
        return unpack(weight) if weight.layout is not torch.strided else weight.clone()

    def clear(self, slot: int) -> None:
        for weights in self._weights:
            weights[slot] = torch.empty(0, dtype=self._dtype)

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        products = _Products(
            weights=self._weights[: self._num_products],
            biases=self._weights[self._num_products :],
            activate=self._activate,
            is_packed=self._is_packed,
            compute_threads=self._compute_threads,
        )
        if len(pair_slot) <= _FEW_PAIRS and len(set(slots := pair_slot.tolist())) == len(slots):
            return products.of_pairs(inputs.index_select(0, pair_input), slots)
        order = pair_slot.argsort(stable=True)
        return products.of_slots(inputs, pair_input, order, torch.bincount(pair_slot))


class PaddedExperts(StackedWeights):
    """Expert kernel with one batched product over all experts. The rows of each expert are padded
    to the number of rows of the busiest expert."""

    def __init__(
        self, exchange: ExchangeSpec, dtype: torch.dtype, compute_threads: ComputeThreads
    ) -> None:
        super().__init__(exchange, dtype, torch.device("cpu"))
        self._compute_threads = compute_threads

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        weights = self._weights
        if len(pair_slot) * _FEW_SLOTS <= len(weights[0]):
            return self._gathered(weights, inputs.index_select(0, pair_input), pair_slot)
        order = pair_slot.argsort(stable=True)
        counts = torch.bincount(pair_slot, minlength=len(weights[0]))
        used = counts.nonzero().squeeze(1)
        height = int(counts.max())
        if len(used) * height > _MAX_PADDING * max(len(order), len(counts)):
            products = _Products(
                weights=weights[: self._num_products],
                biases=weights[self._num_products :],
                activate=self._activate,
                is_packed=False,
                compute_threads=self._compute_threads,
            )
            return products.of_slots(inputs, pair_input, order, counts)
        rows = inputs.index_select(0, pair_input[order])
        rows = self._padded(weights, rows, pair_slot[order], counts, used, height)
        return torch.empty_like(rows).index_copy_(0, order, rows)

    def _gathered(self, weights: Sequence[Tensor], rows: Tensor, slots: Tensor) -> Tensor:
        """Multiply rows [P, in] by copies of the weights of each pair's slot, without sorting:
        [P, out]."""
        gathered = (weight.index_select(0, slots) for weight in weights)
        blocks = batched_products(rows.unsqueeze(1), gathered, self._num_products, self._activate)
        return blocks.squeeze(1)

    def _padded(
        self,
        weights: Sequence[Tensor],
        rows: Tensor,
        slots: Tensor,
        counts: Tensor,
        used: Tensor,
        height: int,
    ) -> Tensor:
        """Multiply rows [P, in] in blocks of ``height`` padded rows, one block per slot: [P, out].

        ``slots`` [P] is the slot of each row, ascending; ``counts`` [slots] is the number of rows
        of each slot, and ``used`` lists the slots with rows.
        """
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(rows)) - starts[slots]
        if len(used) * _FEW_SLOTS <= len(counts):
            slots = torch.searchsorted(used, slots)
            weights = [w[used] for w in weights]
        place += slots * height
        padded = rows.new_zeros(len(weights[0]) * height, rows.shape[1])
        padded[place] = rows
        padded = padded.view(len(weights[0]), height, -1)
        padded = batched_products(padded, weights, self._num_products, self._activate)
        return padded.view(-1, padded.shape[2])[place]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Products:
    """Matrix products of many experts, computed slot by slot and divided between the compute
    threads."""

    weights: Sequence[Sequence[Tensor] | Tensor]
    """Weight matrix of each expert, by [product][slot]."""
    biases: Sequence[Sequence[Tensor] | Tensor]
    """Bias of each expert, by [product][slot]; empty if the experts have no biases."""
    activate: GatedActivation
    """Activation of experts between their first and their second product."""
    is_packed: bool
    compute_threads: ComputeThreads

    def of_pairs(self, rows: Tensor, slots: list[int]) -> Tensor:
        """Multiply rows [P, in], each of a different slot, without sorting: [P, out]."""
        shares = [slice(*share) for share in self.compute_threads.split([1.0] * len(slots))]
        tasks = [partial(self._multiply, rows[s], slots[s], [1] * len(slots[s])) for s in shares]
        parts = self.compute_threads.run(tasks)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def of_slots(self, inputs: Tensor, pair_input: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        """Return outputs [P, out] of the pairs, with one product per used slot and matrix.

        ``order`` [P] sorts the pairs by slot; ``counts`` [slots] is the number of pairs of each
        slot.
        """
        work = [(slot, count) for slot, count in enumerate(counts.tolist()) if count]
        begins = list(accumulate((count for _, count in work), initial=0))
        output = inputs.new_empty(len(order), self.weights[-1][work[0][0]].shape[0])
        sources = pair_input[order]
        # With many rows, slot after slot, so that an expert's intermediate rows stay in the core's
        # cache. With few, all slots at once: fewest calls.
        num_at_once = 1 if len(order) >= _WIDE_ROWS * len(work) else len(work)

        def share(first: int, last: int) -> None:
            for i in range(first, last, num_at_once):
                end = min(i + num_at_once, last)
                pairs = slice(begins[i], begins[end])
                slots, sizes = [slot for slot, _ in work[i:end]], [n for _, n in work[i:end]]
                rows = self._multiply(inputs.index_select(0, sources[pairs]), slots, sizes)
                output.index_copy_(0, order[pairs], rows)

        shares = self.compute_threads.split([_CALL_ROWS + count for _, count in work])
        self.compute_threads.run([partial(share, *part) for part in shares])
        return output

    def _multiply(self, rows: Tensor, slots: list[int], sizes: list[int]) -> Tensor:
        """Run the first ``sizes[0]`` of rows [R, in] through expert slot ``slots[0]``, and so on:
        [R, out]."""
        for i, weights in enumerate(self.weights):
            own = [weights[slot] for slot in slots]
            biases = [self.biases[i][slot] for slot in slots] if self.biases else []
            rows = self.activate(rows) if i else rows
            rows = expert_products(rows, sizes, own, biases, self.is_packed)
        return rows
