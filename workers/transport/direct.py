"""Lets native code send and receive frames on edges.

Native (compiled C) code handles only complete frames with the expected header. In all other cases
Python continues: unsent bytes are queued on their edge. Received bytes are returned to their edge,
which handles them as if they had just arrived.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from workers.native.frames import END_OF_STREAM, FrameFields, StepFields, WaitingFields
from workers.transport.edge import Edge
from workers.transport.edge_table import EdgeTable


class DirectEdges:
    """Edges (connections) to some peers, in the form that native code uses. Data thread only."""

    def __init__(
        self,
        table: EdgeTable,
        edges: Sequence[Edge],
        waiting: WaitingFields,
        check: Callable[[], None],
    ) -> None:
        """``check`` raises ``TransportError`` if the data thread must not wait for peers any more.

        See ``PeerConnections.check``.
        """
        self.edges = tuple(edges)
        self.step = StepFields()
        """Generation, number and flags of the current step, which native code reads."""
        self.waiting = waiting
        """Parameters of waits in native code, such as the time limit after which it returns."""
        self.frames = (FrameFields * len(self.edges))()
        """Frames that native code sends or receives, one for each edge."""
        for frame, edge in zip(self.frames, self.edges, strict=True):
            frame.socket = edge.sock.fileno()
        self._table = table
        self._check = check

    @property
    def are_open(self) -> bool:
        """Whether the selector still watches all edges of this object, so that none is closed."""
        return all(edge.interest for edge in self.edges)

    def are_clear(self) -> bool:
        """Whether no bytes of the edges are queued in this process, so that native code may run.

        Raises ``GenerationChangedError`` or ``PeerLostError`` if waits must end.
        """
        self._check()
        return all(edge.is_clear for edge in self.edges)

    def sent(self) -> None:
        """Record for each edge that native code has sent its frame completely."""
        for edge in self.edges:
            self._table.sent(edge)

    def keep_unsent(self) -> None:
        """Queue the bytes of the frames that native code could not send.

        Raises ``PeerLostError`` if a peer is lost, and ``GenerationChangedError``.
        """
        for edge, frame in zip(self.edges, self.frames, strict=True):
            if frame.error:
                self._table.lose(edge, f"cannot send: {os.strerror(frame.error)}")
            else:
                edge.keep([frame.unsent()])
                self._table.sent(edge)
        self._check()

    def give_back(self) -> None:
        """Return bytes that native code has received to their edges, for Python to handle.

        Call it after an unexpected or incomplete frame.
        """
        for edge, frame in zip(self.edges, self.frames, strict=True):
            if frame.done:
                self._table.give_back(edge, frame.received())
            if frame.error:
                is_end = frame.error == END_OF_STREAM
                reason = "closed by the peer" if is_end else os.strerror(frame.error)
                self._table.lose(edge, reason)
