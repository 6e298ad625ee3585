"""Experts on the compiled kernels of ``workers.native``: the default on CPUs.

Weights are packed when they are stored; no unpacked copy remains. The bits of a row do not depend
on other rows, on the load of a slot or on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.model.config import ClampedSwiglu, ExchangeSpec
from workers.native.experts import (
    ExpertShape,
    InputsBy,
    NativeSlots,
    SlotTable,
    expert_pairs,
    expert_rows,
)
from workers.native.panels import DTYPES, unpack
from workers.native.quantized import pack_weight, unpack_quantized
from workers.native.thread_team import ThreadTeam
from workers.quantization.matrix import Weight


def unsupported_feature(exchange: ExchangeSpec, dtype: torch.dtype) -> str:
    """Return the name of a feature of an exchange that the compiled CPU kernels lack, so that torch
    must compute the experts; ``""`` if no feature is missing.

    Every width is supported, and every even width of quantized weights.
    """
    if dtype not in DTYPES:
        return str(dtype).removeprefix("torch.")
    is_known = exchange.activation == "silu" or isinstance(exchange.activation, ClampedSwiglu)
    if exchange.expert_kind == "gated" and not is_known:
        return f"the activation {exchange.activation}"
    if exchange.form is not None and any(width % 2 for _, width in exchange.product_shapes):
        return "quantized weights of an odd width"
    return ""


class NativeExperts:
    """Expert kernel that calls the compiled CPU kernels; each packed matrix is a separate
    allocation."""

    def __init__(self, exchange: ExchangeSpec, dtype: torch.dtype, team: ThreadTeam) -> None:
        inner = exchange.expert_width if exchange.expert_kind == "gated" else 0
        clamped = exchange.activation if isinstance(exchange.activation, ClampedSwiglu) else None
        self._shape = ExpertShape(
            in_width=exchange.in_width,
            inner=inner,
            out_width=exchange.out_width,
            dtype=dtype,
            has_bias=exchange.has_bias,
            clamped=None if clamped is None else (clamped.alpha, clamped.limit),
            form=exchange.form,
        )
        assert self._shape.matrices == exchange.matrix_shapes
        self._per_slot_input = exchange.per_slot_input
        self._team = team
        self._slots = SlotTable(self._shape, 0)

    @property
    def slots(self) -> NativeSlots:
        """The expert slots in the form that the compiled kernels take; a resize replaces them."""
        return NativeSlots(self._team, self._slots)

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; remaining slots keep their contents, and new slots take no
        memory."""
        self._slots = SlotTable(self._shape, num_slots, self._slots)

    def store(self, slot: int, matrix: int, weight: Weight, is_idle: bool = False) -> None:
        """Pack one matrix of an expert into a slot. ``is_idle``: no step runs, so all threads of
        the team help."""
        team = self._team if is_idle else None
        if isinstance(weight, Tensor):
            weight = weight.to(self._shape.stored_as(matrix))
        packed = pack_weight(self._team.library, weight, self._shape.is_gated(matrix), team)
        self._slots.put(slot, matrix, packed)

    def read(self, slot: int, matrix: int) -> Weight:
        shape, is_gated = self._shape.matrices[matrix], self._shape.is_gated(matrix)
        packed, stored_as = self._slots.get(slot, matrix), self._shape.stored_as(matrix)
        if (form := self._shape.form_of(matrix)) is not None:
            return unpack_quantized(self._team.library, packed, form, shape, is_gated)
        found = unpack(self._team.library, packed, shape, stored_as, is_gated)
        return found.to(self._shape.dtype)

    def clear(self, slot: int) -> None:
        self._slots.clear(slot)

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        inputs = inputs.contiguous()
        return expert_pairs(self._team, self._slots, inputs, pair_input, pair_slot)

    def compute_rows(
        self,
        inputs: Tensor,
        slots: Tensor,
        weights: Tensor,
        float32_weights: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the weighted sum of the expert outputs of each row; see
        ``ExpertBank.compute_rows``."""
        by_slot: InputsBy = "place" if inputs.shape[0] == slots.numel() else "pair"
        return expert_rows(
            self._team,
            self._slots,
            inputs.contiguous(),
            slots,
            weights,
            inputs_by=by_slot if self._per_slot_input else "row",
            rounds_products=not float32_weights,
            dtype=dtype,
        )
