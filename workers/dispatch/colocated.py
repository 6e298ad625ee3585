"""Both sides of dispatch and combine on one worker, which serves requests and holds experts.

Every rank runs the operations of a step in the same global order:

    for bank, exchange:   dispatch 0, dispatch 1,  expert 0, expert 1,  combine 0, combine 1

Numbers are micro-batches. After the combine of a micro-batch, its dispatch of the next exchange
follows directly. The expert part runs at the first combine of an exchange: by then, all ranks have
sent their rows or will send them without waiting for this rank. A rank without rows runs only the
expert part, or sends padding if the header has a bucket. Rows for a rank's own experts stay in the
process.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.cuda.step_graph import StepGraph
from workers.dispatch.captured_serving import CapturedServes
from workers.dispatch.dispatcher import BatchRows, CapturedExchanges, DispatchHandle
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.recording import RecordingTransport
from workers.dispatch.remote import CapturedRows, RemoteDispatcher
from workers.metrics.activity import Activity
from workers.requests.step_header import StepHeader
from workers.transport.transport import DataTransport, ExpectedMessage, RowMessage, Tag


class LoopbackTransport:
    """``DataTransport`` of a colocated worker, which is an attention rank and an expert rank.

    It delivers messages from this rank to itself, and forwards all other messages to ``inner``.
    """

    def __init__(self, inner: DataTransport, rank: int) -> None:
        self._inner = inner
        self._rank = rank
        self._own: dict[Tag, tuple[Tensor, ...]] = {}
        self.apply_generation = inner.apply_generation
        self.close = inner.close
        self.finish_step = inner.finish_step
        self.finish_later = inner.finish_later
        self.confirm_step = inner.confirm_step
        self.await_confirmation = inner.await_confirmation
        self.sums_are_rounded = inner.sums_are_rounded

    def begin_step(self, header: StepHeader) -> None:
        """Start a step, and drop the messages of an abandoned step."""
        self._own.clear()
        self._inner.begin_step(header)

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """Send messages to other ranks, and keep a message to this rank itself for ``receive``.

        Rows for this rank are copied, as the caller may reuse their tensors.
        """
        for message in messages:
            if message.rank == self._rank:
                parts = message.parts
                if tag.direction == "rows":
                    parts = tuple(part.clone() for part in parts)
                self._own[tag] = parts
        others = [m for m in messages if m.rank != self._rank]
        if others:
            self._inner.post(tag, others, sized=sized)

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """Receive one message from each expected rank, as ``DataTransport.receive`` does."""
        others = [e for e in expected if e.rank != self._rank]
        found = self._inner.receive(tag, others, sized=sized, must_wait=must_wait) if others else ()
        received = iter(found)
        return [self._own.pop(tag) if e.rank == self._rank else next(received) for e in expected]

    @property
    def captured_state(self) -> Hashable:
        """A value that changes when captured messages to and from other ranks become invalid."""
        return self._inner.captured_state

    def capture(self, graph: StepGraph) -> None:
        """Return None: ``recording`` captures the messages to other ranks."""

    def recording(
        self, device: torch.device, activity: Activity, graph: StepGraph | None
    ) -> LoopbackTransport:
        """Return a transport that records the messages from and to other ranks in ``graph``.

        If ``graph`` is None, the transport records nothing.
        """
        inner = RecordingTransport(self._inner, device, activity, graph)
        return LoopbackTransport(inner, self._rank)

    def direct(self, ranks: Sequence[int]) -> None:
        """Return None: native code does not send or receive on a colocated worker."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        assert rank != self._rank, f"invalid data from this rank itself: {reason}"
        self._inner.reject(rank, reason)


class ColocatedDispatcher:
    """``TokenDispatcher`` of a colocated worker, which sends rows and serves its own experts.

    ``attention`` and ``server`` must share ``transport``. Data thread only.
    """

    def __init__(
        self, transport: LoopbackTransport, attention: RemoteDispatcher, server: ExpertServer
    ) -> None:
        self._transport = transport
        self._attention = attention
        self._server = server
        self.dispatch = attention.dispatch  # same as on an attention worker
        self.allows_ahead = False  # the counts of the experts are of the latest step
        self.finish_later = attention.finish_later
        self.follow_step = attention.follow_step
        self._served = (-1, -1)
        self._header: StepHeader | None = None
        self._is_only_member = False
        self._is_replayed = False

    @property
    def edge_share(self) -> int:
        """Value for ``StepProposal.edge_share``; see ``TokenDispatcher.edge_share``."""
        return self._attention.edge_share

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        self._attention.set_placement(placement, generation)
        self._server.set_placement(placement, generation)
        self._is_only_member = len(generation.members) == 1

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        self._header = header
        self._is_replayed = False
        self._server.begin_step(header)
        self._attention.begin_step(header, micro_batches)
        self._served = (-1, -1)

    def run_empty_step(self, header: StepHeader) -> None:
        """Run a step in which this rank has no rows: only serve the rows of the other ranks."""
        self._is_replayed = False
        self._attention.run_empty_step(header)
        self._server.run_step(header)

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Wait for the outputs of a dispatch and return them.

        The first combine of an exchange first serves this rank's experts for all micro-batches.
        """
        timer = self._attention.timer
        timer.mark(handle.bank)
        place = (handle.bank.index, handle.exchange)
        if place > self._served:
            self._served = place
            self._server.serve(*place)
        outputs = self._attention.gather(handle)
        timer.lap("combine", handle.bank, handle.exchange, handle.micro_batch)
        return outputs

    def finish_step(self) -> None:
        """Wait for the outputs of all combined dispatches; see ``TokenDispatcher.finish_step``."""
        self._attention.finish_step()

    def end_step(self) -> bool:
        """Return whether every expert rank got all of this rank's rows that it needed.

        If not, the step must run again. After a replayed step (CUDA graph), raises
        ``PeerLostError`` if a rank sent an invalid expert slot.
        """
        if self._is_replayed:
            self._is_replayed = False
            self._server.end_replay()
        return self._attention.end_step()

    # ``CapturableDispatcher``

    def can_capture(self, header: StepHeader) -> bool:
        """Return whether a decode step can be captured as a CUDA graph."""
        if self._is_only_member:  # no rows are exchanged whose padding could be measured
            return not self._attention.picks_rows(header) and not header.prefill_rows
        return self._attention.can_capture(header)

    @property
    def captured_state(self) -> Hashable:
        """A value that changes when captured steps of either side become invalid.

        See ``CapturableDispatcher.captured_state``.
        """
        return self._attention.captured_state, self._server.captured.state

    def captured_shape(self, header: StepHeader) -> Hashable:
        """Return the cache key of a captured step (CUDA graph), without this rank's number of rows.

        The key includes the numbers of rows of the other ranks, whose rows this rank serves.
        """
        others = self._server.captured.shape(header, self._attention.rank)
        return self._attention.captured_shape(header), others

    @contextmanager
    def capture(self, is_row: Tensor, graph: StepGraph | None) -> Iterator[CapturedExchanges]:
        """Context in which the caller computes a decode step that is captured as a CUDA graph.

        See ``CapturableDispatcher.capture``.
        """
        under_way, attention = self._header, self._attention
        assert under_way is not None, "begin_step was not called"
        header = attention.captured_header(under_way, len(is_row))
        transport = self._transport.recording(is_row.device, attention.activity, graph)
        with (
            self._server.as_captured(header, transport) as served,
            attention.as_captured(header, is_row, transport) as rows,
        ):
            self._served = (-1, -1)
            yield _Captured(self, served, rows)
        self.begin_step(under_way, ())

    def replayed(self, served: CapturedServes) -> None:
        """Count the work of this rank's expert side in a replayed step.

        ``served``: the counts that each replay of the step adds.
        """
        self._is_replayed = True
        self._server.captured.count(served, self._server.timer).copy()


@dataclass(frozen=True, slots=True)
class _Captured:
    """``CapturedExchanges`` of a colocated worker: of its attention side and its expert side."""

    dispatcher: ColocatedDispatcher
    served: CapturedServes
    rows: CapturedRows

    def replayed(self) -> None:
        self.dispatcher.replayed(self.served)
        self.rows.replayed()
