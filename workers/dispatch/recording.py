"""Records the messages of a captured step, which each replay sends and receives again.

Messages are sent from and received into tensors at fixed addresses. If the transport can be
captured, they are part of the step's CUDA graph; if not, the host sends and receives them between
two graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import NoReturn

import torch
from torch import Tensor

from workers.cuda.step_graph import StepGraph
from workers.metrics.activity import Activity
from workers.requests.step_header import StepHeader
from workers.transport.transport import (
    DataTransport,
    ExpectedMessage,
    RowMessage,
    Tag,
    empty_messages,
)


class RecordingTransport:
    """``DataTransport`` that records a step's messages for replays of a captured step.

    It sends nothing itself. Without a graph, its receives return zeros.
    """

    def __init__(
        self, live: DataTransport, device: torch.device, activity: Activity, graph: StepGraph | None
    ) -> None:
        """``live``: the transport that replays of ``graph`` use. ``graph`` None: record nothing."""
        self.sums_are_rounded = live.sums_are_rounded
        self.captured_state = live.captured_state
        self.apply_generation = live.apply_generation
        self.close = live.close
        self._live = live
        self._device = device
        self._activity = activity
        self._graph = graph
        self._captured = None if graph is None else live.capture(graph)

    def begin_step(self, header: StepHeader) -> None:
        """Do nothing: the live transport begins the step before each replay."""

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """Record that each replay sends ``messages`` over the live transport at this point."""
        assert not sized, "captured messages have known sizes"
        if self._captured is not None:
            self._captured.post(tag, messages)
            return
        live, activity = self._live, self._activity

        def send() -> None:
            with activity:
                live.post(tag, messages, sized=False)

        if self._graph is not None:
            self._graph.between(send)

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """Record that each replay receives the ``expected`` messages; return the tensors that it
        fills. Without a graph, return zeros."""
        assert not sized, "captured messages have known sizes"
        assert not must_wait, "the host reads nothing within a captured step"
        if self._captured is not None:
            return self._captured.receive(tag, expected)
        live, activity = self._live, self._activity
        places = empty_messages(expected, self._device)

        def receive() -> None:
            with activity:
                found = live.receive(tag, expected, sized=False, must_wait=False)
            for place, parts in zip(places, found, strict=True):
                for tensor, part in zip(place, parts, strict=True):
                    tensor.copy_(part, non_blocking=True)

        if self._graph is not None:
            self._graph.between(receive)
            return places
        for tensor in chain.from_iterable(places):
            tensor.zero_()
        return places

    def finish_step(self) -> None:
        """Do nothing: while a step is recorded, no message is pending."""

    def finish_later(self) -> NoReturn:
        raise AssertionError("a step that is recorded does not run")

    def confirm_step(self) -> None:
        """Do nothing: the live transport confirms each step."""

    def await_confirmation(self) -> None:
        """Do nothing: the live transport waits in each step."""

    def capture(self, graph: StepGraph) -> None:
        """Return None: this transport is being captured."""

    def direct(self, ranks: Sequence[int]) -> None:
        """Return None, as native code does not run captured steps."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        """Close the edge to a rank that sent invalid data. Raises ``PeerLostError``."""
        self._live.reject(rank, reason)


class FixedTables:
    """Copies of an epoch's lookup tables at fixed addresses, from which captured steps read."""

    def __init__(self) -> None:
        self.version = 0
        """Number that changes when the tables are reallocated because their sizes have changed."""
        self._fixed: list[Tensor] = []
        self._shown: Sequence[Tensor] = ()

    def copy_in(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Copy ``tables`` to the fixed tables, in stream order, and return the fixed tables."""
        if len(tables) == len(self._shown) and all(map(is_, tables, self._shown)):
            return self._fixed
        self._shown = tables
        if [t.shape for t in tables] == [t.shape for t in self._fixed]:
            for fixed, table in zip(self._fixed, tables, strict=True):
                fixed.copy_(table)
        else:
            self._fixed = [table.clone() for table in tables]
            self.version += 1
        return self._fixed
