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
from workers.native.thread_team import ThreadTeam
from workers.quantization.matrix import Weight


class ExpertKernel(Protocol):
    """Holds the weights of all expert slots for one exchange, and multiplies rows by them.

    Thread safety: one thread may resize, store and clear while another thread computes with other
    slots. For this, a resize replaces the container of the weights, and a computation reads the
    container only once.
    """

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; remaining slots keep their contents."""

    def store(self, slot: int, matrix: int, weight: Weight) -> None:
        """Copy one matrix [out, in] of an expert from CPU memory into a slot.

        ``matrix``: index in ``ExchangeSpec.matrix_shapes``. ``weight`` has the format that
        ``ExchangeSpec.form_of`` returns for the matrix: quantized, or in the model dtype.
        """

    def read(self, slot: int, matrix: int) -> Weight:
        """Return a CPU copy of one stored matrix [out, in] of one expert."""

    def clear(self, slot: int) -> None:
        """Remove the weights of the expert in a slot."""

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        """Return the expert outputs [P, out_width] of pairs (input row, expert slot), at least one;
        see ``ExpertBank.compute``."""


MakeKernel = Callable[[ExchangeSpec, torch.dtype, torch.device], ExpertKernel]
"""Function that makes an expert kernel without slots, from an exchange, the model dtype and a
device."""


def make_kernel(
    exchange: ExchangeSpec,
    dtype: torch.dtype,
    device: torch.device,
    compute_threads: ComputeThreads | None = None,
    team: ThreadTeam | None = None,
    make_other: MakeKernel | None = None,
    side: SideStream | None = None,
) -> ExpertKernel:
    """Return the fastest expert kernel for an exchange on a device; the kernel has no slots yet.

    ``team`` runs the compiled CPU kernels; with None they are not used. ``compute_threads`` run the
    torch kernels on CPUs; ``make_other`` replaces these for experts that are not quantized.
    ``side``: CUDA stream of the threads that load weights.
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
        """Create empty slots; on CPUs they take no memory until they are filled."""
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.make = make
        """Function that makes the bank's expert kernels, one for each exchange."""
        self.num_slots = 0
        self.version = 0
        """Number that changes when the slots are reallocated."""
        self._kernels = [make(e, dtype, device) for e in spec.exchanges]
        self.resize(num_slots)

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; remaining slots keep their contents."""
        for kernel in self._kernels:
            kernel.resize(num_slots)
        self.num_slots = num_slots
        self.version += 1

    def store(
        self, slot: int, exchange: int, matrix: int, weight: Weight, is_idle: bool = False
    ) -> None:
        """Copy one matrix [out, in] of an expert into ``slot``.

        ``is_idle``: no step runs in this process during the copy, so all threads may help.
        """
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        kernel = self._kernels[exchange]
        if isinstance(kernel, NativeExperts):
            kernel.store(slot, matrix, weight, is_idle)
        else:
            kernel.store(slot, matrix, weight)

    def read(self, slot: int, exchange: int, matrix: int) -> Weight:
        """Return a CPU copy of one matrix [out, in] of the expert in ``slot``.

        May raise ``IndexError`` if another thread has freed the slot.
        """
        return self._kernels[exchange].read(slot, matrix)

    def clear(self, slot: int) -> None:
        for kernel in self._kernels:
            kernel.clear(slot)

    def native(self, exchange: int) -> NativeSlots | None:
        """Return the slots of an exchange for the compiled CPU kernels, or None if other kernels
        compute it."""
        kernel = self._kernels[exchange]
        return kernel.slots if isinstance(kernel, NativeExperts) else None

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """Return the expert output of each pair (input row, expert slot).

        inputs [N, in_width] model dtype; pair_input [P] int64: row of ``inputs`` of each pair;
        pair_slot [P] int64: expert slot. Returns [P, out_width] model dtype, not weighted.
        """
        if not len(pair_slot):
            return inputs.new_empty(0, self.spec.exchanges[exchange].out_width)
        return self._kernels[exchange].compute(inputs, pair_input, pair_slot)

    def compute_rows(
        self, exchange: int, inputs: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return the weighted sum of the expert outputs of each row: [T, out_width] ``dtype``.

        slots [T, k] int64, -1 for none, with at least one other value in each row; weights [T, k]
        float32 or the model's dtype. inputs [T, in_width] model dtype; with ``per_slot_input`` they
        have one row for each slot, [T * k, in_width], or only the rows of slots that are not -1.
        ``dtype`` is the model's or float32. Sums are float32, in the order of slots;
        ``BankSpec.float32_weights`` sets the dtype of the products of outputs and weights.
        """
        kernel, spec = self._kernels[exchange], self.spec.exchanges[exchange]
        if isinstance(kernel, CudaExperts):
            return kernel.compute_rows(inputs, slots, weights, self.spec.float32_weights, dtype)
        weights = weights.float()
        if isinstance(kernel, NativeExperts):
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
