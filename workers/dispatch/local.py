"""The dispatcher of a single process (EP = 1): no network, the reference for all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.dispatch.copies import CopyTables
from workers.dispatch.dispatcher import BatchRows, DispatchHandle, SlotBanks
from workers.dispatch.weighting import weighted_sum
from workers.metrics.activity import Activity
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec
from workers.requests.step_header import StepHeader


@dataclass(frozen=True, slots=True)
class LocalHandle(DispatchHandle):
    """Outputs that are already computed."""

    result: Tensor
    """What ``combine`` returns."""


class LocalDispatcher:
    """Computes every pair on this device's own expert slots.

    The weighted sum adds in slot order in float32 and rounds once. That is what the remote
    dispatcher does in ``per_slot`` mode bit for bit, and in ``sum`` mode with one expert rank.
    """

    def __init__(
        self,
        slots: SlotBanks,
        banks: Sequence[BankSpec],
        activity: Activity | None = None,
        timer: StepTimer | None = None,
    ) -> None:
        """Until ``set_placement``, expert e is in slot e."""
        self.timer = timer or StepTimer()
        """Times attention, dispatch and combine."""
        self._slots = slots
        self._activity = activity or Activity()
        self._banks = tuple(banks)
        self._slot_of: list[Tensor | None] = [None] * len(self._banks)

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Take the slots of device 0 of the placement."""
        device = torch.device("cpu")
        self._slot_of = [
            CopyTables.build(bank, {0: 0}, device).decode_slots[0].long()
            for bank in placement.banks
        ]

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """There is nothing to prepare."""
        self.timer.begin_step(header)

    def sit_out(self, header: StepHeader) -> None:
        """There are no other ranks to serve."""
        self.timer.begin_step(header)

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
        self.timer.lap("attention", spec, exchange, micro_batch)
        num_rows, top_k = topk_ids.shape
        experts = topk_ids.flatten()
        pairs = torch.arange(len(experts), device=experts.device)
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
            weights = topk_weights.float().flatten()
            total = weighted_sum(outputs, weights, pair_row, num_rows, spec.float32_weights)
            result = total.to(outputs.dtype)
        else:
            result = outputs.view(num_rows, top_k, outputs.shape[1])
        self.timer.lap("dispatch", spec, exchange, micro_batch)
        return LocalHandle(
            bank=spec,
            exchange=exchange,
            micro_batch=micro_batch,
            num_rows=num_rows,
            copies=None,
            result=result,
        )

    def combine(self, handle: DispatchHandle) -> Tensor:
        assert isinstance(handle, LocalHandle)
        self.timer.mark()
        self.timer.lap("combine", handle.bank, handle.exchange, handle.micro_batch)
        return handle.result
