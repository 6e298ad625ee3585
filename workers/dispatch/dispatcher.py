"""Interface with which the model runner sends rows to experts and gets their outputs back.

    handle = dispatcher.dispatch(sent)
    ...                                  # the other micro-batch, shared experts
    hidden = dispatcher.combine(handle)

``LocalDispatcher`` (local.py) is the reference, ``RemoteDispatcher`` (remote.py) uses a transport.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
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
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec, returns_pairs
from workers.model.layers import Dispatch
from workers.native.experts import NativeSlots
from workers.native.layers import LayerEnds
from workers.requests.step_header import StepHeader


class BatchRows(Protocol):
    """Properties of the rows of one micro-batch."""

    @property
    def is_inspected(self) -> bool:
        """Whether the host reads values of the rows between the layers."""

    @property
    def is_prefill(self) -> Tensor:
        """Whether each row belongs to a prompt, [T] bool."""

    @property
    def row_key(self) -> Tensor:
        """Hash of (request, choice, position) of each row, [T] int64, which selects the expert
        copies that serve a prompt row."""


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """Handle that ``TokenDispatcher.dispatch`` returns and the caller passes to ``combine``.

    Dispatchers subclass it.
    """

    bank: BankSpec
    exchange: int
    micro_batch: int
    num_rows: int
    """Number of dispatched rows, T."""
    copies: ChosenCopies | None
    """The expert copies that serve prefill rows; None if no copies were chosen (each expert has one
    copy, or all rows use the decode copies)."""


class TokenDispatcher(Protocol):
    """Sends rows to the experts that the router chose, and returns their outputs.

    ``dispatch`` sends without waiting for outputs; ``combine`` waits. Call both in the global order
    (layer, bank and exchange, micro-batch), for every micro-batch of the step header, even if this
    rank runs fewer rows than the header grants, or none.

    Waits raise ``PeerLostError`` if an edge (connection to another worker) breaks or times out, and
    ``GenerationChangedError`` if the controller announced a new generation.
    """

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """Start a step. ``micro_batches``: this rank's rows, one entry for each micro-batch."""

    def run_empty_step(self, header: StepHeader) -> None:
        """Run a step in which the header grants this rank no rows and no padding.

        Call this method instead of all other methods of a step. Raises ``PeerLostError`` and
        ``GenerationChangedError``.
        """

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        """Send the rows of ``sent`` to their experts; pass the result to ``combine``."""

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Return the outputs of a dispatch in the model dtype.

        The shape is [T, out_width], weighted and summed over the k experts of each row, or
        [T, k, out_width] if the exchange is not weighted (``ExchangeSpec.weighted``).
        """

    def finish_step(self) -> None:
        """Wait for the outputs of all combined dispatches.

        Call it before the host reads a value that depends on these outputs. Raises
        ``PeerLostError`` and ``GenerationChangedError``.
        """

    def end_step(self) -> bool:
        """Return whether every expert rank got all of this rank's rows that it needed.

        An expert rank gets fewer if it needs more rows than ``StepHeader.edge_limit``. Then the
        outputs are invalid and the step must run again; this rank's next proposal requests that all
        rows are sent. Call it after ``finish_step``, once the host has read a value that depends on
        the outputs.
        """

    @property
    def edge_share(self) -> int:
        """Value for ``StepProposal.edge_share``: in thousandths, the largest share of this rank's
        decode rows that one expert rank needed in recent steps; 0 if all rows must be sent."""

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Add an expert placement, which steps of ``generation`` use by its epoch."""


class CapturedExchanges(Protocol):
    """The exchanges with the experts in a captured step, which each replay repeats."""

    def replayed(self) -> None:
        """Record a replay of the captured step. Call ``TokenDispatcher.finish_step`` next."""


@runtime_checkable
class CapturableDispatcher(TokenDispatcher, Protocol):
    """A ``TokenDispatcher`` with which decode steps can be captured as CUDA graphs."""

    def can_capture(self, header: StepHeader) -> bool:
        """Whether a decode step can be captured as a CUDA graph: the step header gives all sizes
        beforehand, and the host reads nothing between layers."""

    @property
    def captured_state(self) -> Hashable:
        """A value that changes when captured steps (CUDA graphs) become invalid: the expert ranks
        have changed, or tables or expert slots have moved in memory."""

    def captured_shape(self, header: StepHeader) -> Hashable:
        """Return the dispatcher's part of the cache key of a captured step (CUDA graph).

        Steps with equal keys and equal numbers of padded rows on this rank share a captured step.
        """

    @property
    def allows_ahead(self) -> bool:
        """Whether the next step may begin before the host reads the outputs of this step, which is
        captured."""

    def finish_later(self) -> Callable[[], bool]:
        """Return a function that does the work of ``finish_step`` and ``end_step`` for this step,
        which is captured. The next step may have begun before the function is called.

        Call it after everything that the host will read is enqueued on the device.
        """

    def follow_step(self) -> None:
        """Record that the step before has ended, so that this step begins on the device."""

    def capture(
        self, is_row: Tensor, graph: StepGraph | None
    ) -> AbstractContextManager[CapturedExchanges]:
        """Context in which the caller computes a decode step that is captured in ``graph``.

        The messages to and from experts become part of the graph. Without a graph nothing is sent:
        the run only compiles kernels and allocates memory. is_row [T] int64, read by each replay: 0
        for a row without a request. Enter the context during a step, which continues afterwards.
        The captured step has as many micro-batches as that step, all with equal numbers of rows.
        """


def picks_rows(header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode) -> bool:
    """Whether the host must read which expert rank each row or (row, slot) pair of a step needs.

    True if ``StepHeader.exact``, or if expert ranks return one output for each pair. Such a step
    cannot be captured, and the host waits for its messages.
    """
    return header.exact or returns_pairs(banks, combine_mode)


def max_static_ranks(banks: Iterable[BankSpec], combine_mode: CombineMode) -> int:
    """Return up to how many expert ranks should all receive all rows of prompts on GPUs.

    This is half of the experts of a row: 4 of 8. Then nearly every row has an expert on each rank
    (of 64 experts, 99.8% of the rows with 2 ranks, 92% with 4), and if all rows are sent, no host
    must wait for the device to learn their number. 0 if rows have inputs or outputs by expert.
    """
    banks = tuple(banks)
    by_pair = returns_pairs(banks, combine_mode)
    if by_pair or any(e.per_slot_input for bank in banks for e in bank.exchanges):
        return 0
    return min(bank.top_k for bank in banks) // 2


def has_known_sizes(
    header: StepHeader, banks: Iterable[BankSpec], combine_mode: CombineMode
) -> bool:
    """Whether a step with experts on other workers can be captured: all sizes are known beforehand.

    True if the header has a bucket (a padded number of rows) and the host reads no rows.
    """
    return header.bucket > 0 and not picks_rows(header, banks, combine_mode)


class TimedDispatcher(ABC):
    """Base class of the dispatchers of an attention rank. Measures the times of its own calls."""

    def __init__(self, banks: Sequence[BankSpec], timer: StepTimer | None) -> None:
        self.timer = timer or StepTimer()
        """Timer of the laps ``attention``, ``dispatch`` and ``combine``."""
        self._banks = tuple(banks)

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        """Send rows to their experts without waiting for outputs; pass the result to ``combine``.

        The time since the previous lap counts as ``attention``.
        """
        bank = self._banks[sent.bank]
        self.timer.lap("attention", bank, sent.exchange, micro_batch)
        handle = self._dispatch(bank, sent, micro_batch)
        self.timer.lap("dispatch", bank, sent.exchange, micro_batch)
        return handle

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Wait for the outputs of a dispatch and return them; see ``TokenDispatcher.combine``."""
        self.timer.mark(handle.bank)
        outputs = self.gather(handle)
        self.timer.lap("combine", handle.bank, handle.exchange, handle.micro_batch)
        return outputs

    def end_step(self) -> bool:
        """Return whether every expert rank got all rows it needed; always True by default."""
        return True

    def follow_step(self) -> None:
        """Restart the timer, as the device begins the step only now."""
        self.timer.restart()

    @property
    def edge_share(self) -> int:
        """Value for ``StepProposal.edge_share``; the default 0 requests that all rows are sent to
        all expert ranks."""
        return 0

    def note_layers(self, ends: Sequence[Iterable[LayerEnds]]) -> None:
        """Record the laps of layers that native code has run.

        ``ends``: for each micro-batch, the end times in each bank's layer (``time.monotonic_ns``).
        """
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
                self.timer.mark(bank, end_ns)
            else:
                self.timer.add_laps({name: end_ns}, bank, 0, micro_batch)

    @abstractmethod
    def _dispatch(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> DispatchHandle:
        """Send rows to their experts: ``dispatch`` without the timing."""

    @abstractmethod
    def gather(self, handle: DispatchHandle) -> Tensor:
        """Wait for the outputs of a dispatch and return them: ``combine`` without the timing."""


class SlotBank(Protocol):
    """All expert slots of one bank on this device (``workers.experts.bank.ExpertBank``)."""

    @property
    def version(self) -> int:
        """A number that changes when the memory of the slots is reallocated."""

    def native(self, exchange: int) -> NativeSlots | None:
        """Return the slots of one exchange for native code, or None if torch must compute them."""

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """Compute the expert outputs of (input row, expert slot) pairs.

        inputs [N, in_width] model dtype; pair_input [P] int64: input row of each pair; pair_slot
        [P] int64: expert slot of each pair. Returns [P, out_width] in the model dtype, unweighted.
        """

    def compute_rows(
        self, exchange: int, inputs: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return the weighted sum of the expert outputs of each row, [T, out_width] ``dtype``.

        inputs [T, in_width] model dtype; if every (row, slot) pair has its own input, [T * k,
        in_width], or only the inputs of slots that are not -1. slots [T, k] int64, -1 for a pair to
        leave out; weights [T, k] float32 or the model's dtype. ``dtype``: model dtype or float32.
        Sums are computed as in ``workers.model.weighting``.
        """
