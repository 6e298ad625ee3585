"""Edges that native code sends and receives on by itself, and what comes back to Python.

Native code handles whole frames that are as expected. For all else there is one way: bytes that the
kernel did not take are kept on their edge to be sent, received bytes are given back to their edge
as if they had just arrived, and ``PeerConnections`` goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from workers.native.frames import END_OF_STREAM, FrameFields, StepFields, WaitingFields
from workers.transport.edge import Edge
from workers.transport.edge_table import EdgeTable


class DirectEdges:
    """The edges to some peers. Data thread only."""

    def __init__(
        self,
        table: EdgeTable,
        edges: Sequence[Edge],
        waiting: WaitingFields,
        check: Callable[[], None],
    ) -> None:
        """``check`` raises as ``PeerConnections.check``."""
        self.edges = tuple(edges)
        self.step = StepFields()
        """For C: the step under way."""
        self.waiting = waiting
        """For C: how to wait, and for how long before Python goes on."""
        self.frames = (FrameFields * len(self.edges))()
        """For C: a frame of each edge."""
        for frame, edge in zip(self.frames, self.edges, strict=True):
            frame.socket = edge.sock.fileno()
        self._table = table
        self._check = check

    @property
    def are_open(self) -> bool:
        """None of these edges was closed."""
        return all(edge.interest for edge in self.edges)

    def are_clear(self) -> bool:
        """No bytes of these edges wait in this process: native code may go on with them now.

        Raises as the waits do.
        """
        self._check()
        return all(edge.is_clear for edge in self.edges)

    def sent(self) -> None:
        """All frames were sent whole."""
        for edge in self.edges:
            self._table.sent(edge)

    def keep_unsent(self) -> None:
        """Not all were. Raises ``PeerLostError`` where a peer is lost."""
        for edge, frame in zip(self.edges, self.frames, strict=True):
            if frame.error:
                self._table.lose(edge, f"cannot send: {os.strerror(frame.error)}")
            else:
                edge.keep([frame.rest()])
                self._table.sent(edge)
        self._check()

    def give_back(self) -> None:
        """Not all frames came as expected."""
        for edge, frame in zip(self.edges, self.frames, strict=True):
            if frame.done:
                self._table.give_back(edge, frame.came())
            if frame.error:
                is_end = frame.error == END_OF_STREAM
                reason = "closed by the peer" if is_end else os.strerror(frame.error)
                self._table.lose(edge, reason)
