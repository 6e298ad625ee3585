"""Both sides of dispatch and combine on one worker: it holds requests, and experts for all ranks.

The order of operations is the one global list of a step, on every rank:

    for bank, exchange:   dispatch 0, dispatch 1,  expert 0, expert 1,  combine 0, combine 1

with the next exchange's dispatch of a micro-batch right after its combine. The expert part is run
at the first combine of an exchange, when all ranks have sent their rows or will without waiting
for us; a rank with no rows of its own runs only that part. What a rank sends to its own experts
never leaves the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from cluster.placement import ExpertPlacement
from cluster.topology import Generation
from workers.dist.dispatcher import BatchRows, DispatchHandle
from workers.dist.expert_server import ExpertServer
from workers.dist.header import StepHeader
from workers.dist.remote import RemoteDispatcher
from workers.dist.transport import DataTransport, Expected, Message, Tag


class LoopbackTransport:
    """``DataTransport`` that keeps a rank's messages to itself and hands on all others."""

    def __init__(self, inner: DataTransport, rank: int) -> None:
        self._inner = inner
        self._rank = rank
        self._own: dict[Tag, tuple[Tensor, ...]] = {}

    def begin_step(self, header: StepHeader) -> None:
        """See ``DataTransport``; what an abandoned step left is forgotten."""
        self._own.clear()
        self._inner.begin_step(header)

    def post(self, tag: Tag, messages: Sequence[Message], *, sized: bool) -> None:
        """See ``DataTransport``. Own rows are copied, as their sender may reuse them."""
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
        self, tag: Tag, expected: Sequence[Expected], *, sized: bool
    ) -> list[tuple[Tensor, ...]]:
        """See ``DataTransport``."""
        others = [e for e in expected if e.rank != self._rank]
        received = iter(self._inner.receive(tag, others, sized=sized) if others else ())
        return [self._own.pop(tag) if e.rank == self._rank else next(received) for e in expected]

    def reject(self, rank: int, reason: str) -> NoReturn:
        """See ``DataTransport``."""
        assert rank != self._rank, f"nonsense from ourselves: {reason}"
        self._inner.reject(rank, reason)

    def apply_generation(self, generation: Generation) -> None:
        """See ``DataTransport``."""
        self._inner.apply_generation(generation)

    def close(self) -> None:
        """See ``DataTransport``."""
        self._inner.close()


class ColocatedDispatcher:
    """``TokenDispatcher`` of a colocated worker: the home side, and the expert side where it is due.

    Both sides must share one ``LoopbackTransport``. Data thread only.
    """

    def __init__(self, home: RemoteDispatcher, server: ExpertServer) -> None:
        self._home = home
        self._server = server
        self._served = (-1, -1)

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """See ``TokenDispatcher``."""
        self._home.set_placement(placement, generation)
        self._server.set_placement(placement, generation)

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """See ``TokenDispatcher``."""
        self._server.begin_step(header)
        self._home.begin_step(header, micro_batches)
        self._served = (-1, -1)

    def sit_out(self, header: StepHeader) -> None:
        """Serve the others' rows."""
        self._server.run_step(header)

    def dispatch(
        self,
        rows: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bank: int,
        exchange: int = 0,
        micro_batch: int = 0,
    ) -> DispatchHandle:
        """See ``TokenDispatcher``."""
        return self._home.dispatch(rows, topk_ids, topk_weights, bank, exchange, micro_batch)

    def combine(self, handle: DispatchHandle) -> Tensor:
        """See ``TokenDispatcher``. The first one of an exchange serves all its micro-batches."""
        place = (handle.bank.index, handle.exchange)
        if place > self._served:
            self._served = place
            self._server.serve(*place)
        return self._home.combine(handle)
