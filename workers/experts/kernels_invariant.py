"""Batch-invariant expert kernels, for ``--deterministic``: a row's bits do not depend on other
rows.

The choice of a kernel depends on the size of experts only, not on the number of rows in a step.
Each new kernel is tested (``row_invariance``); if a row's result depends on other rows, the next
kernel is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from workers.experts.bank import ExpertKernel, MakeKernel
from workers.experts.kernels_cpu import PACKED_MIN_ELEMENTS
from workers.experts.stacked import StackedWeights, batched_products
from workers.model.batch_invariant.invariant import (
    LINEAR_FORMS,
    MIN_ROWS,
    ProductVariant,
    RowInvariantLinear,
    check_device,
)
from workers.model.batch_invariant.row_invariance import NUM_TRIED_ROWS, random_rows, refusal
from workers.model.compute_threads import ComputeThreads
from workers.model.config import ExchangeSpec
from workers.model.layers import gated_activation
from workers.quantization.matrix import Weight, plain

Agree = Callable[[MakeKernel, ExchangeSpec, torch.dtype, torch.device], bool]
"""Function that returns whether an expert kernel is batch-invariant; see ``pairs_agree``."""
_GROUPS = ((0, 1), (5, 6), (0, 2), (7, 10), (1, 8), (3, 12), (11, 41), (0, NUM_TRIED_ROWS))
"""Ranges [first, end) of the test inputs. The outputs of each range, computed in a separate call,
must equal the outputs of these inputs in a call with all inputs."""
_MAX_HEIGHT = 64
"""Maximum number of rows of a block in a batched product; a slot with more rows has several
blocks."""
_TRIED_SLOTS = 6


class BlockExperts(StackedWeights):
    """Expert kernel with one batched product over blocks of rows; each block belongs to one slot.

    All blocks of a call have the same height: the number of rows of the busiest slot, but at least
    ``MIN_ROWS`` and at most ``_MAX_HEIGHT``.
    """

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        order = pair_slot.argsort(stable=True)
        slots = pair_slot[order]
        counts = torch.bincount(slots)
        height = min(max(int(counts.max()), MIN_ROWS), _MAX_HEIGHT)
        num_blocks = (counts + (height - 1)) // height
        owners = torch.repeat_interleave(num_blocks)
        # Index of a row: its slot's first block, then its index among the slot's rows.
        begins = (num_blocks.cumsum(0) - num_blocks) * height - (counts.cumsum(0) - counts)
        places = begins[slots] + torch.arange(len(slots))
        blocks = inputs.new_zeros(len(owners) * height, inputs.shape[1])
        blocks[places] = inputs[pair_input[order]]
        blocks = blocks.view(len(owners), height, -1)
        weights = (weight.index_select(0, owners) for weight in self._weights)
        blocks = batched_products(blocks, weights, self._num_products, self._activate)
        rows = blocks.view(-1, blocks.shape[2])[places]
        return torch.empty_like(rows).index_copy_(0, order, rows)


class LoopExperts:
    """Expert kernel that multiplies slot by slot, with matrix products of the variant ``form``."""

    def __init__(
        self,
        exchange: ExchangeSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        form: ProductVariant,
    ) -> None:
        shapes = exchange.product_shapes
        self._activate = gated_activation(exchange.activation)
        self._form = form
        self._compute_threads = ComputeThreads()
        self._width = shapes[-1][0]
        self._products: list[list[RowInvariantLinear | None]] = [[] for _ in shapes]
        self._biases: list[list[Tensor | None]] = [[] for _ in shapes if exchange.has_bias]

    def resize(self, num_slots: int) -> None:
        """Add empty slots until there are ``num_slots``; empty slots take no memory. Slots are
        never removed."""
        for products in self._products:
            products += [None] * (num_slots - len(products))
        for biases in self._biases:
            biases += [None] * (num_slots - len(biases))

    def store(self, slot: int, matrix: int, weight: Weight) -> None:
        if matrix >= len(self._products):
            self._biases[matrix - len(self._products)][slot] = plain(weight).clone()
            return
        product = RowInvariantLinear(plain(weight).clone(), None, self._form, self._compute_threads)
        self._products[matrix][slot] = product

    def read(self, slot: int, matrix: int) -> Tensor:
        if matrix >= len(self._products):
            bias = self._biases[matrix - len(self._products)][slot]
            return torch.empty(0) if bias is None else bias.clone()
        product = self._products[matrix][slot]
        return torch.empty(0) if product is None else product.weight()

    def clear(self, slot: int) -> None:
        for products in self._products:
            products[slot] = None
        for biases in self._biases:
            biases[slot] = None

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        outputs = inputs.new_empty(len(pair_slot), self._width)
        order = pair_slot.argsort(stable=True)
        counts = torch.bincount(pair_slot).tolist()
        for slot, places in enumerate(torch.split(order, counts)):
            if len(places):
                rows = inputs[pair_input[places]]
                for matrix, products in enumerate(self._products):
                    product = products[slot]
                    assert product is not None, f"slot {slot} is empty"
                    rows = product(self._activate(rows) if matrix else rows)
                    bias = self._biases[matrix][slot] if self._biases else None
                    rows = rows if bias is None else rows + bias.flatten()
                outputs[places] = rows
        return outputs


class InvariantKernels:
    """Factory of batch-invariant expert kernels; tests each shape of experts once and caches the
    result."""

    def __init__(self, agree: Agree | None = None) -> None:
        """``agree`` tests a kernel; the default is ``pairs_agree``."""
        self._agree = agree or pairs_agree
        self._chosen: dict[tuple[object, ...], MakeKernel | None] = {}

    def make(
        self, exchange: ExchangeSpec, dtype: torch.dtype, device: torch.device
    ) -> ExpertKernel:
        """Return a batch-invariant expert kernel, without slots, of the fastest kind that passes
        the test.

        Raises ``ConfigError`` if the device is not a CPU or no kind passes.
        """
        check_device(device)
        key = (exchange.matrix_shapes, exchange.activation, dtype)
        if key not in self._chosen:
            found = (f for f in forms(exchange) if self._agree(f, exchange, dtype, device))
            self._chosen[key] = next(found, None)
        make = self._chosen[key]
        if make is None:
            raise refusal(f"the {dtype} experts' output")
        return make(exchange, dtype, device)


def forms(exchange: ExchangeSpec) -> tuple[MakeKernel, ...]:
    """Return functions that make the expert kernels to test for experts of this size, fastest
    first."""
    loops = tuple(partial(LoopExperts, form=form) for form in LINEAR_FORMS)
    out, width = exchange.matrix_shapes[0]
    return loops if out * width >= PACKED_MIN_ELEMENTS else (BlockExperts, *loops)


def pairs_agree(
    make: MakeKernel, exchange: ExchangeSpec, dtype: torch.dtype, device: torch.device
) -> bool:
    """Return whether a pair (input row, slot) has an output of the same bits in all tested
    batches."""
    inputs = random_rows(NUM_TRIED_ROWS, exchange.in_width, dtype=dtype)
    found = []
    for num_slots, first in ((_TRIED_SLOTS, _TRIED_SLOTS - 2), (2, 0)):
        kernel = make(exchange, dtype, device)
        kernel.resize(num_slots)
        for matrix, shape in enumerate(exchange.matrix_shapes):
            weights = random_rows(2, *shape, dtype=dtype)
            for slot in range(num_slots):
                kernel.store(slot, matrix, weights[(slot - first) % 2])
        found.append(_Trial(kernel, inputs, num_slots, first))
    expected = found[0].together()
    return torch.equal(found[1].together(), expected) and all(
        torch.equal(trial.group(expert, *rows, num_mates), expected[expert, slice(*rows)])
        for trial in found
        for expert in (0, 1)
        for rows in _GROUPS
        for num_mates in (0, 2, trial.num_slots)
    )


@dataclass(frozen=True, slots=True)
class _Trial:
    """A kernel to test, with two experts in slots ``first`` and ``first + 1``."""

    kernel: ExpertKernel
    inputs: Tensor
    num_slots: int
    first: int

    def together(self) -> Tensor:
        """Compute both experts for all inputs in one call: outputs [2, inputs, out]."""
        count = len(self.inputs)
        sources = torch.arange(count).repeat(2)
        slots = self.first + torch.arange(2).repeat_interleave(count)
        return self.kernel.compute(self.inputs, sources, slots).view(2, count, -1)

    def group(self, expert: int, first: int, last: int, num_mates: int) -> Tensor:
        """Compute inputs ``first`` to ``last - 1`` of one expert, in a call that begins with
        ``num_mates`` other pairs: [inputs, out]."""
        mates = torch.arange(num_mates)
        rows = torch.arange(first, last)
        slots = torch.full_like(rows, self.first + expert)
        sources, slots = torch.cat((mates, rows)), torch.cat((mates, slots))
        return self.kernel.compute(self.inputs, sources, slots)[num_mates:]
