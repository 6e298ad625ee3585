"""The expert slots of one bank on one device, and the choice of their kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from workers.experts.kernels_cpu import PACKED_MIN_ELEMENTS, PackedExperts, PaddedExperts
from workers.experts.kernels_cuda import CudaExperts
from workers.experts.kernels_dequantizing import DequantizingExperts
from workers.experts.kernels_native import NativeExperts, unsupported_feature
from workers.model.compute_threads import ComputeThreads
from workers.model.config import BankSpec, ExchangeSpec
from workers.model.side_stream import SideStream
from workers.model.weighting import sum_of_pairs
from workers.native.experts import NativeSlots
from workers.native.team import Team
from workers.quantization.matrix import Weight


class ExpertKernel(Protocol):
    """Weights of all slots for one exchange, and their product with rows.

    One thread may resize, store and clear while another computes with other slots: a computation
    reads the weights' container once, and a resize replaces it as a whole.
    """

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; slots that stay keep their contents."""

    def store(self, slot: int, matrix: int, weight: Weight) -> None:
        """Copy one matrix [out, in] of one expert from the CPU, in ``ExchangeSpec.form_of``."""

    def read(self, slot: int, matrix: int) -> Weight:
        """A copy of one stored matrix [out, in] of one expert, on the CPU."""

    def clear(self, slot: int) -> None:
        """Empty a slot."""

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        """See ``ExpertBank.compute``; at least one pair."""


MakeKernel = Callable[[ExchangeSpec, torch.dtype, torch.device], ExpertKernel]
"""An empty kernel for one exchange."""


def make_kernel(
    exchange: ExchangeSpec,
    dtype: torch.dtype,
    device: torch.device,
    compute_threads: ComputeThreads | None = None,
    team: Team | None = None,
    make_other: MakeKernel | None = None,
    side: SideStream | None = None,
) -> ExpertKernel:
    """The fastest kernel for experts of this kind and size; ``team``: of compiled kernels.

    ``make_other`` makes those of torch on CPUs, in place of the fastest; ``side`` is for the
    threads that load.
    """
    if device.type == "cuda":
        return CudaExperts(exchange, dtype, device, side)
    if team is not None and not unsupported_feature(exchange, dtype):
        return NativeExperts(exchange, dtype, team)
    if exchange.form is not None:  # on a CPU
        return DequantizingExperts(exchange, dtype)
    if make_other is not None:
        return make_other(exchange, dtype, device)
    out, width = exchange.matrix_shapes[0]
    kernel = PackedExperts if out * width >= PACKED_MIN_ELEMENTS else PaddedExperts
    return kernel(exchange, dtype, compute_threads or ComputeThreads())


class ExpertBank:
    """Expert slots of one bank. A slot is empty or holds all matrices of one physical expert."""

    def __init__(
        self,
        spec: BankSpec,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        make: MakeKernel = make_kernel,
    ) -> None:
        """Empty slots; on CPUs they take no memory until they are filled."""
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.make = make
        """Makes the bank's kernels."""
        self.num_slots = 0
        self.version = 0
        """See ``SlotBank``."""
        self._kernels = [make(e, dtype, device) for e in spec.exchanges]
        self.resize(num_slots)

    def resize(self, num_slots: int) -> None:
        """Change the capacity; slots that stay keep their contents."""
        for kernel in self._kernels:
            kernel.resize(num_slots)
        self.num_slots = num_slots
        self.version += 1

    def store(
        self, slot: int, exchange: int, matrix: int, weight: Weight, is_idle: bool = False
    ) -> None:
        """Copy one matrix [out, in] of the expert in ``slot``.

        ``is_idle``: no step computes in this process meanwhile, so that all threads may help.
        """
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        kernel = self._kernels[exchange]
        if isinstance(kernel, NativeExperts):
            kernel.store(slot, matrix, weight, is_idle)
        else:
            kernel.store(slot, matrix, weight)

    def read(self, slot: int, exchange: int, matrix: int) -> Weight:
        """A copy of one matrix [out, in] of the expert in ``slot``, on the CPU.

        Raises ``IndexError`` where another thread has given the slot back.
        """
        return self._kernels[exchange].read(slot, matrix)

    def clear(self, slot: int) -> None:
        for kernel in self._kernels:
            kernel.clear(slot)

    def native(self, exchange: int) -> NativeSlots | None:
        """The slots as they are now, for native code; None: torch computes."""
        kernel = self._kernels[exchange]
        return kernel.slots if isinstance(kernel, NativeExperts) else None

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """Run (input row, expert slot) pairs; slots without pairs are not touched.

        inputs [N, in_width] model dtype; pair_input [P] int64 row of inputs of each pair;
        pair_slot [P] int64 expert slot -> [P, out_width] model dtype, not weighted.
        """
        if not len(pair_slot):
            return inputs.new_empty(0, self.spec.exchanges[exchange].out_width)
        return self._kernels[exchange].compute(inputs, pair_input, pair_slot)

    def compute_rows(
        self, exchange: int, inputs: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The weighted sum over each row's slots; at least one of them is not -1.

        inputs [T, in_width] model dtype, or with ``per_slot_input`` [T * k, in_width], or only
        those of the slots that are not -1; slots [T, k] int64, -1 for none; weights [T, k] float32
        -> [T, out_width] ``dtype``, which is the model's or float32. A sum is made in float32 in
        the order of the slots, of products in the type that ``BankSpec.float32_weights`` says.
        """
        kernel, spec = self._kernels[exchange], self.spec.exchanges[exchange]
        if isinstance(kernel, NativeExperts | CudaExperts):
            return kernel.compute_rows(inputs, slots, weights, self.spec.float32_weights, dtype)
        return sum_of_pairs(
            kernel.compute,
            inputs,
            slots,
            weights,
            per_slot_input=spec.per_slot_input,
            float32_weights=self.spec.float32_weights,
            dtype=dtype,
        )
