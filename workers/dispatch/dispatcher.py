"""Interface of the model runner to the experts: it dispatches rows and combines their outputs.

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
    """Properties of the rows of one micro-batch."""

    @property
    def is_prefill(self) -> Tensor:
        """[T] bool: whether the row belongs to a prompt."""

    @property
    def row_key(self) -> Tensor:
        """[T] int64: hash of (request, choice, position), selects the copy for prefill rows."""


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """Result of ``dispatch``, to be passed to ``combine``. Each dispatcher has its subclass."""

    bank: BankSpec
    exchange: int
    micro_batch: int
    num_rows: int
    """Number of dispatched rows, T."""
    copies: ChosenCopies | None
    """The copies that serve prefill rows; None if each expert has one copy."""


class TokenDispatcher(Protocol):
    """Sends rows to the experts that the router chose, and returns their outputs.

    ``dispatch`` sends without waiting; ``combine`` waits. Both must be called in the global order
    (layer, bank and exchange, micro-batch), for every micro-batch of the header, even if this rank
    runs fewer rows than it was granted, or none.

    Waits raise ``PeerLostError`` if an edge breaks or times out, and ``GenerationChangedError`` if
    the controller announced a new generation.
    """

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """Start a step with the granted rows that this rank runs."""

    def run_empty_step(self, header: StepHeader) -> None:
        """Run a step in which no row was granted to this rank.

        Called instead of all other methods. Raises as the waits do.
        """

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        """Send rows to their experts."""

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Return the outputs of a dispatch in the model dtype.

        [T, out_width], or [T, k, out_width] if not weighted.
        """

    def finish_step(self) -> None:
        """Wait for the outputs of all combined dispatches. Raises as the waits do.

        Must be called before the host reads results of the outputs.
        """

    def end_step(self) -> bool:
        """Whether all rows that an expert rank needed were sent to it (``StepHeader.edge_limit``).

        If not, the outputs are invalid and the step must run again; this rank's next proposal
        then requests that all rows are sent. Call it after ``finish_step``, when the host has read
        a result of the outputs.
        """

    @property
    def edge_share(self) -> int:
        """See ``StepProposal``."""

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Add the maps of an epoch, for the members of a generation."""


class CapturedExchanges(Protocol):
    """The exchanges of a captured step."""

    def replayed(self) -> None:
        """Record that the step was replayed. ``finish_step`` follows."""


@runtime_checkable
class CapturableDispatcher(TokenDispatcher, Protocol):
    """A ``TokenDispatcher`` that supports capturing decode steps."""

    def can_capture(self, header: StepHeader) -> bool:
        """Whether a decode step can be captured: sizes are known, and the host reads nothing
        between layers."""

    @property
    def captured_state(self) -> Hashable:
        """A value that changes when captured steps become invalid, as tables or slots moved."""

    def captured_shape(self, header: StepHeader) -> Hashable:
        """Return the cache key of the begun step, without the rows of this rank."""

    def capture(
        self, is_row: Tensor, graph: StepGraph | None
    ) -> AbstractContextManager[CapturedExchanges]:
        """Compute a decode step within the context, and add its messages to ``graph``.

        is_row [T] int64, read by each replay: 0 for a row without a request. All micro-batches have
        the same number of rows. Without a graph nothing is sent: kernels are compiled and memory is
        allocated. The begun step, which gives the number of micro-batches, continues afterwards.
        """


def picks_rows(header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode) -> bool:
    """Whether the host of both sides reads the expert rank of each row or pair."""
    return header.exact or returns_pairs(banks, combine_mode)


def reads_rows(header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode) -> bool:
    """Whether the host reads rows within a step, for the exchange or to measure padding."""
    return picks_rows(header, banks, combine_mode) or is_measured(header)


def has_known_sizes(
    header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode
) -> bool:
    """Whether a step with experts on other workers can be captured."""
    return header.bucket > 0 and not reads_rows(header, banks, combine_mode)


def must_wait(header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode) -> bool:
    """Whether the host waits for received messages in a step that is not captured.

    It waits if the header has a bucket, as transports then permit many pending receives, which only
    captured steps may use.
    """
    return header.bucket > 0 or reads_rows(header, banks, combine_mode)


class TimedDispatcher(ABC):
    """Base class of the dispatchers of an attention rank, which times their calls."""

    def __init__(self, banks: Sequence[BankSpec], timer: StepTimer | None) -> None:
        self.timer = timer or StepTimer()
        """Times attention, dispatch and combine."""
        self._banks = tuple(banks)

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        """See ``TokenDispatcher``. Sends without waiting."""
        bank = self._banks[sent.bank]
        self.timer.lap("attention", bank, sent.exchange, micro_batch)
        handle = self._dispatch(bank, sent, micro_batch)
        self.timer.lap("dispatch", bank, sent.exchange, micro_batch)
        return handle

    def combine(self, handle: DispatchHandle) -> Tensor:
        """See ``TokenDispatcher``. Waits for the outputs."""
        self.timer.mark()
        outputs = self.gather(handle)
        self.timer.lap("combine", handle.bank, handle.exchange, handle.micro_batch)
        return outputs

    def end_step(self) -> bool:
        """See ``TokenDispatcher``. All needed rows were sent."""
        return True

    @property
    def edge_share(self) -> int:
        """See ``StepProposal``. All rows are sent to all ranks."""
        return 0

    def note_layers(self, ends: Sequence[Iterable[LayerEnds]]) -> None:
        """Record the times of native layers. ``ends``: by micro-batch and bank."""
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
                self.timer.add_laps({name: end_ns}, bank, 0, micro_batch)

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
        """Changes when the slots are reallocated."""

    def native(self, exchange: int) -> NativeSlots | None:
        """Return the current slots for native code, or None if torch computes them."""

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
        """Return the weighted sum over each row's slots, [T, out_width] ``dtype``.

        inputs [T, in_width] model dtype; if every slot has its own input, [T * k, in_width], or
        only the inputs of slots that are not -1. slots [T, k] int64, -1 for none; weights [T, k]
        float32. ``dtype``: model dtype or float32. Sums are computed as in
        ``workers.model.weighting``.
        """
