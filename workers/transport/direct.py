"""Lets native code send and receive frames on edges.

Native code handles only complete frames with the expected header. In all other cases Python
continues: unsent bytes are queued on their edge. Received bytes are returned to their edge, which
handles them as if they had just arrived.
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
        """``check`` raises an error if waits must end; see ``PeerConnections.check``."""
        self.edges = tuple(edges)
        self.step = StepFields()
        """Current step, read by C."""
        self.waiting = waiting
        """Parameters of waits in C, among them the time limit after which C returns."""
        self.frames = (FrameFields * len(self.edges))()
        """One frame for each edge, shared with C."""
        for frame, edge in zip(self.frames, self.edges, strict=True):
            frame.socket = edge.sock.fileno()
        self._table = table
        self._check = check

    @property
    def are_open(self) -> bool:
        """Whether none of these edges was closed."""
        return all(edge.interest for edge in self.edges)

    def are_clear(self) -> bool:
        """Whether this process has no pending bytes of these edges, so that native code may run.

        Raises the errors of ``check``.
        """
        self._check()
        return all(edge.is_clear for edge in self.edges)

    def sent(self) -> None:
        """Record for each edge that its frame was sent completely."""
        for edge in self.edges:
            self._table.sent(edge)

    def keep_unsent(self) -> None:
        """Queue the unsent rest of the frames. Raises ``PeerLostError`` if a peer is lost."""
        for edge, frame in zip(self.edges, self.frames, strict=True):
            if frame.error:
                self._table.lose(edge, f"cannot send: {os.strerror(frame.error)}")
            else:
                edge.keep([frame.unsent()])
                self._table.sent(edge)
        self._check()

    def give_back(self) -> None:
        """Return received bytes to their edges after an unexpected or incomplete frame."""
        for edge, frame in zip(self.edges, self.frames, strict=True):
            if frame.done:
                self._table.give_back(edge, frame.received())
            if frame.error:
                is_end = frame.error == END_OF_STREAM
                reason = "closed by the peer" if is_end else os.strerror(frame.error)
                self._table.lose(edge, reason)
