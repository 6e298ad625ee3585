"""The dispatcher of a single process (EP = 1): no network, and the reference for all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.placement import ExpertPlacement
from cluster.topology import Generation
from workers.dist.activity import Activity
from workers.dist.copies import CopyTables
from workers.dist.dispatcher import BatchRows, DispatchHandle, SlotBanks
from workers.dist.header import StepHeader
from workers.dist.weighting import weighted_sum
from workers.families.base import BankSpec


@dataclass(frozen=True, slots=True)
class LocalHandle(DispatchHandle):
    """The outputs, already computed."""

    result: Tensor
    """What ``combine`` returns."""


class LocalDispatcher:
    """Computes every pair on this device's own expert slots.

    The weighted sum adds in slot order in float32 and rounds once. That is what the remote
    dispatcher does in ``per_slot`` mode bit for bit, and in ``sum`` mode with one expert rank.
    """

    def __init__(
        self, slots: SlotBanks, banks: Sequence[BankSpec], activity: Activity | None = None
    ) -> None:
        """Expert e is taken to be in slot e until ``set_placement`` says otherwise."""
        self._slots = slots
        self._activity = activity or Activity()
        self._banks = tuple(banks)
        self._slot_of: list[Tensor | None] = [None] * len(self._banks)

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Find the experts where device 0 of the placement holds them."""
        device = torch.device("cpu")
        self._slot_of = [
            CopyTables.build(bank, {0: 0}, device).decode_slots[0].long()
            for bank in placement.banks
        ]

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """Nothing to prepare."""

    def sit_out(self, header: StepHeader) -> None:
        """Nothing: there are no others."""

    def dispatch(
        self,
        rows: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bank: int,
        exchange: int = 0,
        micro_batch: int = 0,
    ) -> LocalHandle:
        """Compute at once; see ``TokenDispatcher.dispatch`` for the shapes."""
        self._activity.advance()
        spec = self._banks[bank]
        num_rows, top_k = topk_ids.shape
        experts = topk_ids.flatten()
        weights = topk_weights.float().flatten()
        pairs = torch.arange(len(experts), device=experts.device)
        if experts.numel() and int(experts.min()) < 0:  # device-to-host sync
            pairs = (experts >= 0).nonzero().squeeze(1)
            experts, weights = experts[pairs], weights[pairs]
        pair_row = pairs // top_k
        per_slot = spec.exchanges[exchange].per_slot_input
        inputs = rows.flatten(0, 1) if per_slot else rows
        slot_of = self._slot_of[bank]
        slots = experts if slot_of is None else slot_of.to(experts.device)[experts]
        outputs = rows.new_empty(0, spec.exchanges[exchange].out_width)
        if len(pairs):
            outputs = self._slots.banks[bank].compute(
                exchange, inputs, pairs if per_slot else pair_row, slots
            )
        if spec.exchanges[exchange].weighted:
            total = weighted_sum(outputs, weights, pair_row, num_rows, spec.float32_weights)
            result = total.to(outputs.dtype)
        else:
            result = outputs.new_zeros(num_rows * top_k, outputs.shape[1])
            result[pairs] = outputs
            result = result.view(num_rows, top_k, outputs.shape[1])
        return LocalHandle(
            bank=spec,
            exchange=exchange,
            micro_batch=micro_batch,
            num_rows=num_rows,
            copies=None,
            result=result,
        )

    def combine(self, handle: DispatchHandle) -> Tensor:
        """The outputs of a dispatch of this dispatcher."""
        assert isinstance(handle, LocalHandle)
        return handle.result
