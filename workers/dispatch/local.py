"""Dispatcher of a single process (EP = 1) without a network: the reference for the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.core.topology import Generation
from workers.cuda.step_graph import StepGraph
from workers.dispatch.copies import CopyTables
from workers.dispatch.dispatcher import (
    BatchRows,
    CapturedExchanges,
    DispatchHandle,
    SlotBank,
    TimedDispatcher,
)
from workers.metrics.activity import Activity
from workers.metrics.captured_laps import CapturedLaps
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec
from workers.model.layers import Dispatch
from workers.native.experts import BankExperts, LocalExperts
from workers.requests.step_header import StepHeader


@dataclass(frozen=True, slots=True)
class LocalHandle(DispatchHandle):
    """Handle of a dispatch whose outputs ``dispatch`` has already computed."""

    result: Tensor
    """Outputs of the experts, which ``combine`` returns."""


class LocalDispatcher(TimedDispatcher):
    """``TokenDispatcher`` that computes every expert on this device, without a network.

    The weighted sum of a row adds its top-k outputs in order in float32 and rounds once.
    ``RemoteDispatcher`` computes the same bits in combine mode ``per_slot``, and in mode ``sum`` if
    there is one expert rank.
    """

    def __init__(
        self,
        slots: Sequence[SlotBank],
        banks: Sequence[BankSpec],
        activity: Activity | None = None,
        timer: StepTimer | None = None,
    ) -> None:
        """``slots``: expert slots by ``BankSpec.index``.

        Before ``set_placement``, each expert e is in slot e.
        """
        super().__init__(banks, timer)
        self._slots = slots
        self.activity = activity or Activity()
        """Progress counter of the data thread, which advances with each exchange."""
        self._slot_of: list[Tensor | None] = [None] * len(self._banks)
        self._num_placements = 0
        self._experts: LocalExperts | None = None
        self._experts_state: Hashable = None
        """Value of ``captured_state`` when ``_experts`` was set."""

    @property
    def captured_state(self) -> Hashable:
        """A value that changes when captured steps (CUDA graphs) become invalid, because experts or
        slots have moved."""
        return self._num_placements, *(bank.version for bank in self._slots)

    def can_capture(self, header: StepHeader) -> bool:
        """Return True: without a network, every decode step can be captured as a CUDA graph."""
        return True

    def captured_shape(self, header: StepHeader) -> Hashable:
        """Return None: the cache key of a captured step needs only the number of rows."""
        return None

    @property
    def allows_ahead(self) -> bool:
        """Whether the next step may begin before the host reads the outputs of this step: always,
        except if the times of this step are measured."""
        return not self.timer.is_recording

    def finish_later(self) -> Callable[[], bool]:
        """Return a function that returns True: there is nothing to wait for."""
        return lambda: True

    @contextmanager
    def capture(self, is_row: Tensor, graph: StepGraph | None) -> Iterator[CapturedExchanges]:
        """Context in which the caller captures a decode step as a CUDA graph, without messages."""
        yield _CapturedExperts(self, self.timer.capture(len(self._banks)))

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Use the slots in which the placement puts the experts on device 0, the only device."""
        slot_of = [_moved(bank) for bank in placement.banks]
        if any(map(_differ, slot_of, self._slot_of)):  # otherwise captured steps stay valid
            self._slot_of = slot_of
            self._num_placements += 1

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """Start a step: start the timer. No other preparation is necessary."""
        self.timer.begin_step(header)

    def run_empty_step(self, header: StepHeader) -> None:
        """Run a step without rows: start the timer. There are no other ranks to serve."""
        self.timer.begin_step(header)

    def finish_step(self) -> None:
        """Do nothing, as ``dispatch`` has computed the outputs."""

    def experts(self) -> LocalExperts | None:
        """Return the experts of all banks, for layers that native code runs.

        None if a bank has several exchanges, or if torch must compute a bank.
        """
        if (state := self.captured_state) != self._experts_state:
            parts = zip(self._banks, self._slots, self._slot_of, strict=True)
            found = [
                BankExperts(native.table, slot_of, spec.float32_weights)
                for spec, bank, slot_of in parts
                if len(spec.exchanges) == 1 and (native := bank.native(0)) is not None
            ]
            self._experts = LocalExperts(found) if len(found) == len(self._banks) else None
            self._experts_state = state
        return self._experts

    def _dispatch(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> LocalHandle:
        self.activity.advance()
        exchange = bank.exchanges[sent.exchange]
        num_rows, top_k = sent.topk_ids.shape
        inputs = sent.rows.flatten(0, 1) if exchange.per_slot_input else sent.rows
        slot_of = self._slot_of[sent.bank]
        slots = sent.topk_ids
        if slot_of is not None:
            slot_of = self._slot_of[sent.bank] = slot_of.to(slots.device)  # moved once
            slots = slot_of[slots]
        own = self._slots[sent.bank]
        if not num_rows:
            shape = (0, exchange.out_width) if exchange.weighted else (0, top_k, exchange.out_width)
            result = sent.rows.new_empty(shape)
        elif exchange.weighted:
            weights, dtype = sent.topk_weights, sent.rows.dtype
            result = own.compute_rows(sent.exchange, inputs, slots, weights, dtype)
        else:
            pairs = torch.arange(slots.numel(), device=slots.device)
            pair_input = pairs if exchange.per_slot_input else pairs // top_k
            outputs = own.compute(sent.exchange, inputs, pair_input, slots.flatten())
            result = outputs.view(num_rows, top_k, exchange.out_width)
        return LocalHandle(bank, sent.exchange, micro_batch, num_rows, None, result)

    def gather(self, handle: DispatchHandle) -> Tensor:
        assert isinstance(handle, LocalHandle)
        return handle.result


@dataclass(frozen=True, slots=True)
class _CapturedExperts:
    """``CapturedExchanges`` of a process with all experts."""

    dispatcher: LocalDispatcher
    laps: CapturedLaps

    def replayed(self) -> None:
        self.dispatcher.timer.replay(self.laps)
        self.dispatcher.activity.advance()


def _differ(new: Tensor | None, old: Tensor | None) -> bool:
    return new is not old and (new is None or old is None or not torch.equal(new, old.cpu()))


def _moved(bank: BankPlacement) -> Tensor | None:
    """Return the slot of each expert, [experts] int64, or None if each expert e is in slot e."""
    slots = CopyTables.build(bank, {0: 0}, torch.device("cpu")).decode_slots[0].long()
    return None if torch.equal(slots, torch.arange(len(slots))) else slots
