"""Attention side of dispatch and combine: a ``TokenDispatcher`` with experts on other ranks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from msgspec.structs import replace
from torch import Tensor

from cluster.config.cluster import CombineMode
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.cuda.step_graph import StepGraph
from workers.dispatch.combine import OutputCombiner, RemoteHandle
from workers.dispatch.dispatcher import (
    BatchRows,
    CapturedExchanges,
    DispatchHandle,
    TimedDispatcher,
    has_known_sizes,
    picks_rows,
)
from workers.dispatch.edge_rows import EdgeRows, NeededRows
from workers.dispatch.expert_maps import ExpertMaps
from workers.dispatch.native_attention_side import NativeExchange
from workers.dispatch.recording import RecordingTransport
from workers.dispatch.row_exchange import (
    AttentionSide,
    CapturedExchange,
    ExactExchange,
    RowExchange,
    StaticExchange,
)
from workers.metrics.activity import Activity
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec, returns_pairs
from workers.model.layers import Dispatch
from workers.native.panels import DTYPES
from workers.native.thread_team import ThreadTeam
from workers.requests.step_header import Grant, Grants, StepHeader
from workers.transport.transport import DataTransport


class CapturedRows:
    """``CapturedExchanges`` of one attention rank."""

    def __init__(self, dispatcher: RemoteDispatcher, edge_rows: EdgeRows, num_banks: int) -> None:
        self.needed: NeededRows = ()
        self._dispatcher = dispatcher
        self._edge_rows = edge_rows
        self._laps = dispatcher.timer.capture(num_banks)

    def replayed(self) -> None:
        """Record a replay of the captured step. Call ``TokenDispatcher.finish_step`` next."""
        self._edge_rows.put_noted(self.needed)
        self._dispatcher.timer.replay(self._laps)
        self._dispatcher.activity.advance()


class RemoteDispatcher(TimedDispatcher):
    """``TokenDispatcher`` of one attention rank whose experts are on other ranks.

    For each step it selects the ``RowExchange`` that moves the rows. Data thread only.
    """

    def __init__(
        self,
        transport: DataTransport,
        banks: Sequence[BankSpec],
        *,
        rank: int,
        combine_mode: CombineMode,
        dtype: torch.dtype,
        device: torch.device,
        activity: Activity | None = None,
        timer: StepTimer | None = None,
        team: ThreadTeam | None = None,
    ) -> None:
        """``team``: threads of compiled CPU kernels, used instead of torch if they support the
        dtype."""
        super().__init__(banks, timer)
        team = team if dtype in DTYPES else None
        self._transport = transport
        self.activity = activity or Activity()
        """Progress counter of the data thread, which advances with each exchange."""
        self.rank = rank
        """Rank of the attention worker."""
        self._device = device
        self._maps = ExpertMaps(combine_mode, device, None if team is None else team.library)
        self._edge_rows = EdgeRows()
        self._side = side = AttentionSide(
            rank,
            self._banks,
            self._maps,
            self._edge_rows,
            OutputCombiner(dtype, device),
            self.activity,
        )
        self._static = StaticExchange(side, transport)
        self._exact = ExactExchange(side, transport)
        self._native = None if team is None else NativeExchange(side, transport, team)
        self._exchange: RowExchange = self._static
        self._header: StepHeader | None = None
        self._has_begun = False
        """Whether this rank takes part in the exchanges of the current step."""
        self._placement_seen = 0, 0
        """Generation and placement epoch of the latest step; (0, 0) before the first."""

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Add an expert placement, which steps of ``generation`` use by its epoch.

        Raises ``ProtocolError`` if the placement uses a device that no expert worker has.
        """
        groups = [m.group for m in generation.attention if m.rank == self.rank]
        self._maps.set_placement(placement, generation, *groups)
        if generation.number != self._placement_seen[0]:
            self._edge_rows.forget()
        self._edge_rows.can_limit = (
            self._native is None
            and not returns_pairs(self._banks, self._maps.combine_mode)
            and not any(e.per_slot_input for bank in self._banks for e in bank.exchanges)
            and len(self._maps.ranks) > max(bank.top_k for bank in self._banks)
        )

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """Start a step. ``micro_batches``: this rank's rows, one entry for each micro-batch.

        Raises ``ProtocolError`` for an unknown epoch.
        """
        self._maps.begin_step(header, micro_batches)
        self._header = header
        self.timer.begin_step(header)
        self._edge_rows.begin_step(has_rows=header.rows(self.rank, 0) > 0)
        if (header.generation, header.epoch) != self._placement_seen:
            self._placement_seen = header.generation, header.epoch
            self._edge_rows.forget()
        with self.activity:
            self._transport.begin_step(header)
        self._has_begun = True
        self._exchange = self._exchange_of(header)
        is_inspected = any(batch.is_inspected for batch in micro_batches)
        self._exchange.begin_step(header, is_inspected=is_inspected)

    def _exchange_of(self, header: StepHeader) -> RowExchange:
        """Select the exchange of a step that is not captured."""
        if header.exact:
            return self._exact
        if self._native is None or header.edge_limit or header.bucket:
            return self._static
        return self._native

    def run_empty_step(self, header: StepHeader) -> None:
        """Run a step in which this rank has no rows: it takes no part in the exchanges.

        Maps of old epochs are dropped.
        """
        self.timer.begin_step(header)
        self._has_begun = False
        self._edge_rows.begin_step()
        self._maps.forget(header.oldest_epoch)

    @property
    def native(self) -> NativeExchange | None:
        """The ``RowExchange`` of the current step if native code may run it, else None."""
        return self._exchange if isinstance(self._exchange, NativeExchange) else None

    def _dispatch(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> RemoteHandle:
        return self._exchange.dispatch(bank, sent, micro_batch)

    def gather(self, handle: DispatchHandle) -> Tensor:
        assert isinstance(handle, RemoteHandle)
        return self._exchange.gather(handle)

    def finish_step(self) -> None:
        """Wait for the outputs of all combined dispatches; see ``TokenDispatcher.finish_step``."""
        with self.activity:
            self._transport.finish_step()
        self._edge_rows.finish_step()

    def end_step(self) -> bool:
        """Return whether every expert rank got all rows it needed; else the step must run again.

        Raises ``PeerLostError`` and ``GenerationChangedError`` if an expert rank did not get them.
        """
        if self._has_begun:
            self._has_begun = False
            with self.activity:
                self._transport.await_confirmation()
        return self._edge_rows.end_step()

    @property
    def allows_ahead(self) -> bool:
        """Whether the next step may begin before the host reads this one: only if the messages are
        part of the graph, and the times of this step are not measured."""
        return self._transport.captured_state is not None and not self.timer.is_recording

    def finish_later(self) -> Callable[[], bool]:
        """Return a function that finishes and ends this step; see ``CapturableDispatcher``."""
        self._edge_rows.finish_step()
        finish, end = self._transport.finish_later(), self._edge_rows.end_later()
        self._has_begun = False

        def finish_and_end() -> bool:
            with self.activity:
                finish()
            return end()

        return finish_and_end

    @property
    def edge_share(self) -> int:
        """Value for ``StepProposal.edge_share``; see ``TokenDispatcher.edge_share``."""
        return self._edge_rows.share if self._edge_rows.can_limit else 0

    # ``CapturableDispatcher``

    def can_capture(self, header: StepHeader) -> bool:
        """Return whether a decode step can be captured as a CUDA graph."""
        return has_known_sizes(header, self._banks, self._maps.combine_mode)

    def picks_rows(self, header: StepHeader) -> bool:
        """Whether the host must read which expert rank each row or (row, slot) pair of a step
        needs; such a step cannot be captured."""
        return picks_rows(header, self._banks, self._maps.combine_mode)

    @property
    def captured_state(self) -> Hashable:
        """A value that changes when captured steps (CUDA graphs) become invalid, because the expert
        ranks or their connections have changed, or tables have moved."""
        maps = self._maps
        return maps.ranks, maps.combine_mode, maps.version, self._transport.captured_state

    def captured_shape(self, header: StepHeader) -> Hashable:
        """Return the dispatcher's part of the cache key of a captured step (CUDA graph)."""
        return header.edge_limit

    @contextmanager
    def capture(self, is_row: Tensor, graph: StepGraph | None) -> Iterator[CapturedExchanges]:
        """Context in which the caller computes a decode step that is captured as a CUDA graph.

        See ``CapturableDispatcher.capture``.
        """
        current = self._header
        assert current is not None, "begin_step was not called"
        header = self.captured_header(current, len(is_row))
        transport = RecordingTransport(self._transport, self._device, self.activity, graph)
        with self.as_captured(header, is_row, transport) as rows:
            yield rows
        self.begin_step(current, ())

    def captured_header(self, header: StepHeader, num_rows: int) -> StepHeader:
        """Return ``header`` with ``num_rows`` decode rows for this rank."""
        own = Grant(decode_rows=num_rows)
        return replace(header, grants=Grants.of({**dict(header.grants), self.rank: own}))

    @contextmanager
    def as_captured(
        self, header: StepHeader, is_row: Tensor, transport: DataTransport
    ) -> Iterator[CapturedRows]:
        """Context in which the exchanges of a decode step are captured; it begins the step.

        ``transport`` records the messages. is_row [T] int64, read by each replay: 0 for a row
        without a request. The yielded object is complete after the context.
        """
        self._maps.begin_step(header, (), is_row.view(header.num_micro_batches, -1))
        self._edge_rows.begin_step()
        self._exchange = CapturedExchange(self._side, transport)
        self._exchange.begin_step(header)
        rows = CapturedRows(self, self._edge_rows, len(self._banks))
        yield rows
        rows.needed = self._edge_rows.take_noted()
