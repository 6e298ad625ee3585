"""Routed experts of one layer on a CPU (``c/experts.c``).

Reference: ``workers.experts.kernels_cpu``, and ``workers.model.weighting`` for the sums. As in the
reference, the outputs of experts are rounded before the sum.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workers.native.panels import DTYPES
from workers.native.quantized import FormFields, form_fields, weight_bytes
from workers.native.structs import c_struct
from workers.native.thread_team import ThreadTeam, check
from workers.quantization.formats import WeightFormat

InputsBy = Literal["row", "place", "pair"]
"""Unit that has an input of its own: a row, a place (row and index in top-k), or a pair (place with
an expert slot)."""
_INPUTS_BY: tuple[InputsBy, ...] = ("row", "place", "pair")


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Shape of experts that compute ``second(activation(gate, up))``, or one product if ``inner``
    is 0."""

    in_width: int
    inner: int
    """Width between the two matrices of a gated expert (the first has twice this number of rows); 0
    for experts of one matrix."""
    out_width: int
    dtype: torch.dtype
    has_bias: bool = False
    """Whether each matrix of a product has a bias, [out, 1]; biases follow all matrices of
    products."""
    clamped: tuple[float, float] | None = None
    """Alpha and limit of the clamped SwiGLU; None for silu(gate) * up."""
    form: WeightFormat | None = None
    """Format of quantized matrices, which have even widths; None: not quantized. Biases never
    are."""

    @property
    def num_products(self) -> int:
        return 2 if self.inner else 1

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Shape [out, in] of each matrix of an expert, first those of products, then biases."""
        products = [(2 * self.inner, self.in_width), (self.out_width, self.inner)]
        if not self.inner:
            products = [(self.out_width, self.in_width)]
        biases = [(out, 1) for out, _ in products] if self.has_bias else []
        return (*products, *biases)

    def is_gated(self, matrix: int) -> bool:
        """Whether a matrix (given by its index in ``matrices``) has gate rows followed by up
        rows."""
        return self.inner > 0 and matrix % self.num_products == 0

    def stored_as(self, matrix: int) -> torch.dtype:
        """Return the dtype in which a matrix is packed if it is not quantized; biases are
        float32."""
        return self.dtype if matrix < self.num_products else torch.float32

    def form_of(self, matrix: int) -> WeightFormat | None:
        """Return the quantized format of a matrix, or None if it is not quantized."""
        return self.form if matrix < self.num_products else None

    def num_bytes(self, matrix: int) -> int:
        """Return the size of a packed matrix in bytes."""
        form, is_gated = self.form_of(matrix), self.is_gated(matrix)
        return weight_bytes(self.matrices[matrix], self.stored_as(matrix), form, is_gated)


@c_struct("experts.h", "experts_call", form=FormFields)
class CallFields(ctypes.Structure):
    """C ``struct experts_call``: expert slots, inputs and outputs of one call of the experts'
    kernel."""


class SlotTable:
    """Packed matrices of expert slots. A slot is usable only with all its matrices."""

    def __init__(self, shape: ExpertShape, num_slots: int, old: SlotTable | None = None) -> None:
        """Create slots. Those that ``old`` has, too, get its matrices; all other slots are
        empty."""
        self.shape = shape
        self._packed: list[list[Tensor | None]] = []
        self._addresses = torch.zeros(len(shape.matrices), num_slots, dtype=torch.int64)
        self._num_slots = num_slots
        pointers = [row.data_ptr() for row in self._addresses]
        biases = pointers[shape.num_products :]
        alpha, limit = shape.clamped or (1.0, 0.0)
        self.fields = CallFields(
            dtype=DTYPES.index(shape.dtype),
            is_gated=shape.inner > 0,
            in_width=shape.in_width,
            inner_width=shape.inner,
            out_width=shape.out_width,
            num_slots=num_slots,
            form=form_fields(shape.form),
            first=pointers[0],
            second=pointers[1] if shape.inner else None,
            first_bias=biases[0] if biases else None,
            second_bias=biases[-1] if biases else None,
            activation=shape.clamped is not None,
            alpha=alpha,
            limit=limit,
        )
        """C struct with the fields that all calls with these slots share. Its pointers point into
        this table."""
        for matrix in range(len(shape.matrices)):
            kept = old._packed[matrix][:num_slots] if old is not None else []
            self._packed.append([None] * num_slots)
            for slot, packed in enumerate(kept):
                if packed is not None:
                    self.put(slot, matrix, packed)

    def __len__(self) -> int:
        return self._num_slots

    def get(self, slot: int, matrix: int) -> Tensor:
        """Return a packed matrix of a slot. Raises ``IndexError`` if the slot is empty."""
        packed = self._packed[matrix][slot]
        if packed is None:
            raise IndexError(f"slot {slot} is empty")
        return packed

    def put(self, slot: int, matrix: int, packed: Tensor) -> None:
        """Store a packed matrix, made by ``quantized.pack_weight``, in a slot."""
        expected = self.shape.num_bytes(matrix)
        assert packed.nbytes == expected, f"{packed.nbytes} bytes: must be {expected}"
        assert packed.is_contiguous()
        self._packed[matrix][slot] = packed
        self._addresses[matrix, slot] = packed.data_ptr()

    def clear(self, slot: int) -> None:
        """Free a slot's memory. No computation may use the slot."""
        self._addresses[:, slot] = 0
        for packed in self._packed:
            packed[slot] = None


class NativeSlots(NamedTuple):
    """Expert slots of one exchange, and the thread team that computes them."""

    team: ThreadTeam
    table: SlotTable


class BankExperts(NamedTuple):
    """Experts of one bank that are in this process."""

    table: SlotTable
    slot_of: Tensor | None
    """[experts] int64: slot of each expert; None if every expert e is in slot e."""
    float32_weights: bool
    """Whether router weights stay float32 when outputs are multiplied by them; otherwise they are
    first cast to the model dtype."""


class LocalExperts:
    """Experts of all banks, all in this process, for ``layers.run_layers``."""

    def __init__(self, banks: Sequence[BankExperts]) -> None:
        self.calls = (CallFields * len(banks))()
        """C structs by ``BankSpec.index``, with all parameters of a call except the rows."""
        self._banks = banks  # keeps the memory of ``calls`` alive
        for i, (table, slot_of, float32_weights) in enumerate(banks):
            self.calls[i] = table.fields
            self.calls[i].slot_of = None if slot_of is None else slot_of.data_ptr()
            self.calls[i].rounds_products = not float32_weights

    def __len__(self) -> int:
        return len(self._banks)


def expert_pairs(
    team: ThreadTeam, table: SlotTable, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
) -> Tensor:
    """Return the expert output of each pair (input row, expert slot).

    inputs [N, in_width] of the shape's dtype; pair_input, pair_slot [P] int64. Returns
    [P, out_width]. Raises ``IndexError`` for an empty or missing slot or input.
    """
    out = inputs.new_empty(pair_slot.shape[0], table.shape.out_width)
    if pair_slot.shape[0]:
        assert pair_input.shape == pair_slot.shape
        pair_input = pair_input.contiguous()
        call = _call(table, inputs, pair_slot.unsqueeze(1), out)
        call.input_of = _address(pair_input, torch.int64)
        _compute(team, call)
    return out


def expert_rows(
    team: ThreadTeam,
    table: SlotTable,
    inputs: Tensor,
    slots: Tensor,
    weights: Tensor,
    *,
    inputs_by: InputsBy,
    rounds_products: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weighted sum of the outputs of each row's expert slots, in slot order, in float32.

    inputs [N, in_width] of the shape's dtype; slots [T, k] int64, -1 for none; weights [T, k]
    float32. Returns [T, out_width] ``dtype``. ``rounds_products``: round weights, then products of
    weight and output, to the shape's dtype. Raises ``IndexError`` for an empty or missing slot or
    input.
    """
    out = inputs.new_empty(slots.shape[0], table.shape.out_width, dtype=dtype)
    if slots.shape[0]:
        assert weights.shape == slots.shape
        call = _call(table, inputs, slots, out)
        call.inputs_by = _INPUTS_BY.index(inputs_by)
        call.weights, call.weights_stride = _rows_address(weights, torch.float32)
        call.rounds_products = rounds_products
        call.sums_dtype = DTYPES.index(dtype)
        _compute(team, call)
    return out


def _call(table: SlotTable, inputs: Tensor, slots: Tensor, out: Tensor) -> CallFields:
    shape = table.shape
    assert inputs.shape[1:] == (shape.in_width,), f"inputs of shape {tuple(inputs.shape)}"
    address, stride = _rows_address(slots, torch.int64)
    call = CallFields.from_buffer_copy(table.fields)
    call.inputs, call.num_inputs = _address(inputs, shape.dtype), inputs.shape[0]
    call.slots, call.slots_stride = address, stride
    call.num_rows, call.top_k = slots.shape
    call.out = out.data_ptr()
    return call


def _compute(team: ThreadTeam, call: CallFields) -> None:
    check(team.library.functions.experts_compute(team.pointer, ctypes.byref(call)))


def _address(tensor: Tensor, dtype: torch.dtype) -> int:
    """Return the address of a contiguous CPU tensor of ``dtype``."""
    assert tensor.dtype == dtype, f"{tensor.dtype}: must be {dtype}"
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _rows_address(tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Return the address and the row stride of a CPU matrix of ``dtype``."""
    assert tensor.dtype == dtype, f"{tensor.dtype}: must be {dtype}"
    assert tensor.device.type == "cpu"
    assert tensor.shape[1] == 1 or tensor.stride(1) == 1, "elements of a row must be contiguous"
    return tensor.data_ptr(), tensor.stride(0)
