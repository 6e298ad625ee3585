"""The model runner's interface to the experts: rows go out, weighted sums come back.

    handle = dispatcher.dispatch(sent)
    ...                                  # the other micro-batch, shared experts
    hidden = dispatcher.combine(handle)

``LocalDispatcher`` (local.py) is the reference, ``RemoteDispatcher`` (remote.py) uses a transport.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cluster.config.cluster import CombineMode
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.cuda.step_graph import StepGraph
from workers.dispatch.copies import ChosenCopies
from workers.metrics.step_metrics import is_measured
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec, returns_pairs
from workers.model.layers import Dispatch
from workers.native.experts import NativeSlots
from workers.native.layers import LayerEnds
from workers.requests.step_header import StepHeader


class BatchRows(Protocol):
    """The rows of one micro-batch, as far as a dispatcher needs them."""

    @property
    def is_prefill(self) -> Tensor:
        """[T] bool: the row belongs to a prompt."""

    @property
    def row_key(self) -> Tensor:
        """[T] int64: hash of (request, choice, position); picks the copy for prefill rows."""


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """What ``dispatch`` passes to ``combine``; every dispatcher has its own subclass."""

    bank: BankSpec
    exchange: int
    micro_batch: int
    num_rows: int
    """Rows [T] that were dispatched."""
    copies: ChosenCopies | None
    """The copies that serve prefill rows; None: experts have one copy."""


class TokenDispatcher(Protocol):
    """Sends rows to the experts that the router chose, and returns their outputs.

    ``dispatch`` sends at once and does not wait; ``combine`` waits. Both must be called in the
    global order (layer, bank and exchange, micro-batch), for every micro-batch of the header, also
    when this rank ends up with fewer rows than it was granted, or none.

    The waits raise ``PeerLostError`` when an edge breaks or times out and
    ``GenerationChangedError`` when the controller announced a new generation.
    """

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """Start a step with the rows that this rank runs of its grant."""

    def sit_out(self, header: StepHeader) -> None:
        """Take part in a step in which this rank was granted no row.

        Called instead of all other methods. Raises as the waits do.
        """

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        """Send rows to their experts."""

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Outputs of a dispatch: [T, out_width] model dtype, [T, k, out_width] if not weighted."""

    def finish_step(self) -> None:
        """Wait for the outputs of all dispatches that were combined, before the host reads anything
        that was computed of them. Raises as the waits do.
        """

    def end_step(self) -> bool:
        """Whether all rows that an expert rank needed were sent to it (``StepHeader.edge_limit``).

        If not, the outputs are of no use and the step must run again; this rank's next proposal
        lets no row be left out. Comes after ``finish_step``, when the host has read something that
        was computed of the outputs.
        """

    @property
    def edge_share(self) -> int:
        """See ``StepProposal``."""

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Take the maps of an epoch, for the members of a generation."""


class CapturedExchanges(Protocol):
    """The exchanges of a captured step."""

    def replayed(self) -> None:
        """The step was replayed; ``finish_step`` follows."""


@runtime_checkable
class CapturableDispatcher(TokenDispatcher, Protocol):
    """A ``TokenDispatcher`` whose steps of decodes can be captured."""

    def can_capture(self, header: StepHeader) -> bool:
        """Whether a step of decodes can be: nothing looks between its layers, sizes are known."""

    @property
    def captured_state(self) -> Hashable:
        """Where this changes, captured steps are of no use: tables or slots are in other memory."""

    def captured_shape(self, header: StepHeader) -> Hashable:
        """What a captured step depends on beside the rows of this rank, which has begun it."""

    def capture(
        self, is_row: Tensor, graph: StepGraph | None
    ) -> AbstractContextManager[CapturedExchanges]:
        """Within it, a step of decode rows is computed, and messages become parts of ``graph``.

        is_row [T] int64, read by each replay: 0 for a row without a request. Micro-batches have
        equally many rows. With no graph nothing is sent: kernels are compiled, memory is taken. The
        step that has begun, which says how many micro-batches, goes on afterwards.
        """


def picks_rows(header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode) -> bool:
    """Whether the host reads which rows or pairs are whose, on both sides of all exchanges."""
    return header.exact or returns_pairs(banks, combine_mode)


def reads_rows(header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode) -> bool:
    """Whether it reads rows between the layers of a step: there, or to measure padding."""
    return picks_rows(header, banks, combine_mode) or is_measured(header)


def has_known_sizes(
    header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode
) -> bool:
    """Whether a step with experts on other workers can be captured."""
    return header.bucket > 0 and not reads_rows(header, banks, combine_mode)


def must_wait(header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode) -> bool:
    """Whether the host waits for what it receives in a step that is not captured.

    With a bucket it does, as transports let it get far ahead then, which is for captured steps.
    """
    return header.bucket > 0 or reads_rows(header, banks, combine_mode)


class TimedDispatcher(ABC):
    """The part that all dispatchers of an attention rank share: the timing of their calls."""

    def __init__(self, banks: Sequence[BankSpec], timer: StepTimer | None) -> None:
        self.timer = timer or StepTimer()
        """Times attention, dispatch and combine."""
        self._banks = tuple(banks)

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        """See ``TokenDispatcher``; sends at once."""
        bank = self._banks[sent.bank]
        self.timer.lap("attention", bank, sent.exchange, micro_batch)
        handle = self._dispatch(bank, sent, micro_batch)
        self.timer.lap("dispatch", bank, sent.exchange, micro_batch)
        return handle

    def combine(self, handle: DispatchHandle) -> Tensor:
        """See ``TokenDispatcher``; waits for the outputs."""
        self.timer.mark()
        outputs = self.gather(handle)
        self.timer.lap("combine", handle.bank, handle.exchange, handle.micro_batch)
        return outputs

    def end_step(self) -> bool:
        """See ``TokenDispatcher``: no rows were left out."""
        return True

    @property
    def edge_share(self) -> int:
        """See ``StepProposal``: all rows go to all ranks."""
        return 0

    def note_layers(self, ends: Sequence[Iterable[LayerEnds]]) -> None:
        """Time what native layers have done: ``ends`` by micro-batch and bank."""
        if not self.timer.is_recording:
            return
        parts = [
            (end_ns, name, bank, micro_batch)
            for micro_batch, of_banks in enumerate(ends)
            for bank, found in zip(self._banks, of_banks, strict=True)
            for name, *_ in LayerEnds._fields_
            if (end_ns := getattr(found, name))
        ]
        for end_ns, name, bank, micro_batch in sorted(parts, key=itemgetter(0)):
            if name == "mlp":
                self.timer.mark(end_ns)
            else:
                self.timer.passed({name: end_ns}, bank, 0, micro_batch)

    @abstractmethod
    def _dispatch(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> DispatchHandle:
        """``dispatch`` without its timing."""

    @abstractmethod
    def gather(self, handle: DispatchHandle) -> Tensor:
        """``combine`` without its timing."""


class SlotBank(Protocol):
    """All expert slots of one bank on this device (``workers.experts.bank.ExpertBank``)."""

    @property
    def version(self) -> int:
        """Changes when the slots get other memory."""

    def native(self, exchange: int) -> NativeSlots | None:
        """The slots as they are now, for native code; None: torch computes."""

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """Run (input row, expert slot) pairs.

        inputs [N, in_width] model dtype; pair_input [P] int64 row of inputs of each pair;
        pair_slot [P] int64 expert slot -> [P, out_width] model dtype, not weighted.
        """

    def compute_rows(
        self, exchange: int, inputs: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The weighted sum over each row's slots.

        inputs [T, in_width] model dtype, or where every slot has an input of its own
        [T * k, in_width], or only those of the slots that are not -1; slots [T, k] int64, -1 for
        none; weights [T, k] float32 -> [T, out_width] ``dtype``, which is the model's or float32.
        Sums are made as in ``workers.model.weighting``.
        """
