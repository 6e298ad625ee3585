"""Table of the open edges of one worker, which reads their frames and records lost peers."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Mapping

from cluster.core.errors import ProtocolError
from workers.transport.edge import Edge, GroupFrames, StepFrame
from workers.transport.frames import DATA_KINDS, Frame, FrameHeader
from workers.transport.path_watch import PathWatch, path_state

logger = logging.getLogger(__name__)

_MAX_STEP_FRAMES = 4096
_READ = selectors.EVENT_READ
_WRITE = selectors.EVENT_WRITE


class EdgeTable:
    """All open edges of one worker, on its selector. No method waits or raises for a broken edge.

    While a peer's inbox has more than ``max_inbox_bytes``, its edge is not read. An edge is lost if
    the peer's host acknowledges nothing for ``path_limit_s``.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        owner: str,
        max_inbox_bytes: int,
        path_limit_s: float,
    ) -> None:
        self.edges: dict[str, Edge] = {}
        """Open edges by the peer's worker name."""
        self.lost: dict[str, str] = {}
        """Workers whose edge broke in the current generation, with the reasons."""
        self.generation = 0
        """Current generation. Frames of older generations are dropped; a newer one is an error."""
        self._groups: dict[int, GroupFrames] = {}
        self._group_of: Mapping[str, int] = {}
        self.max_inbox_bytes = max_inbox_bytes
        self._path_limit_s = path_limit_s
        self._paths: dict[Edge, PathWatch] = {}
        self._selector = selector
        self._owner = owner

    def group(self, index: int) -> GroupFrames:
        """Return the frames of the step group with this index in ``Generation.groups``."""
        return self._groups.setdefault(index, GroupFrames())

    def begin_generation(
        self, number: int, members: frozenset[str], groups: Mapping[str, int]
    ) -> None:
        """Close edges to workers other than ``members``, and drop all received frames.

        ``groups``: index of the step group of each worker that is not in group 0.
        """
        self.generation = number
        self.lost.clear()
        self._group_of = groups
        for group in self._groups.values():
            group.step_frames.clear()
        for edge in list(self.edges.values()):
            self._clear_inbox(edge)
            if edge.name in members:
                edge.frames = self.group(groups.get(edge.name, 0))
                self.watch(edge)
            else:
                self.close(edge)

    def add(self, edge: Edge) -> None:
        """Add a new edge, which replaces an open edge to the same peer."""
        old = self.edges.get(edge.name)
        if old is not None:
            self.close(old)
        self.lost.pop(edge.name, None)
        self.edges[edge.name] = edge
        edge.frames = self.group(self._group_of.get(edge.name, 0))
        self.watch(edge)

    def watch(self, edge: Edge) -> None:
        """Update the events that the selector watches for an edge."""
        wanted = _READ if edge.inbox_bytes <= self.max_inbox_bytes else 0
        if edge.out_bytes:
            wanted |= _WRITE
        if wanted == edge.interest:
            return
        if not edge.interest:
            self._selector.register(edge.sock, wanted, edge)
        elif not wanted:
            self._selector.unregister(edge.sock)
        else:
            self._selector.modify(edge.sock, wanted, edge)
        edge.interest = wanted

    def close(self, edge: Edge) -> None:
        """Close an edge without recording its peer as lost."""
        if edge.interest:
            self._selector.unregister(edge.sock)
            edge.interest = 0
        self._clear_inbox(edge)
        self._paths.pop(edge, None)
        edge.close()
        if self.edges.get(edge.name) is edge:
            del self.edges[edge.name]

    def lose(self, edge: Edge, reason: str) -> None:
        """Close an edge that broke or carried invalid data, and record its peer as lost."""
        logger.warning("%s: edge to %s closed: %s", self._owner, edge.name, reason)
        self.close(edge)
        self.lost.setdefault(edge.name, reason)

    @property
    def is_settled(self) -> bool:
        """Whether no edge is watched for unacknowledged bytes: all sent bytes were acknowledged."""
        return not self._paths

    def sent(self, edge: Edge) -> None:
        """Start to watch whether the peer's host acknowledges the bytes sent on an edge."""
        if edge not in self._paths:
            self._paths[edge] = PathWatch(self._path_limit_s)
        if edge.out_bytes or edge.interest != _READ:
            self.watch(edge)

    def look(self, now: float) -> None:
        """Check the watched edges for dead network paths, at monotonic time ``now``.

        An edge with a dead path is closed and its peer recorded as lost. An edge without
        unacknowledged bytes is no longer watched.
        """
        for edge, path in list(self._paths.items()):
            state = path_state(edge.sock)
            reason = path.look(state, now) if state is not None else None
            if reason is not None:
                self.lose(edge, reason)
            elif path.is_settled and not edge.out_bytes:
                self._paths.pop(edge, None)

    def serve(self, edge: Edge, events: int) -> None:
        """Send and read on an edge for which the selector reported ``events``."""
        if events & _WRITE and edge.interest:
            try:
                edge.flush()
            except OSError as err:
                self.lose(edge, f"cannot send: {err.strerror or err}")
                return
            self.watch(edge)
        if events & _READ and edge.interest:
            self.read(edge)

    def read(self, edge: Edge) -> None:
        """Read from an edge; put a complete frame into its inbox or its group's step frames.

        A broken edge or invalid data closes the edge and records its peer as lost.
        """
        try:
            frame = edge.read()
            if frame is not None:
                self._file(edge, frame)
        except ProtocolError as err:
            self.lose(edge, f"protocol error: {err}")
        except OSError as err:
            self.lose(edge, str(err.strerror or err))
        else:
            if edge.inbox_bytes > self.max_inbox_bytes:
                self.watch(edge)

    def give_back(self, edge: Edge, data: bytes) -> None:
        """Process bytes that native code has received on an edge but cannot use."""
        edge.give_back(data)
        while edge.has_given_back and edge.interest:
            self.read(edge)

    def take(self, edge: Edge, want: FrameHeader) -> Frame | None:
        """Remove and return the next data frame of an edge, which must match ``want``.

        Returns None if no frame has arrived. Frames of earlier steps are dropped; a frame of
        another kind or place closes the edge, and its peer is recorded as lost.
        """
        while edge.inbox:
            frame = edge.pop()
            if edge.interest != _READ:
                self.watch(edge)
            got = frame.header
            if got.step < want.step:
                continue
            if (got.kind, got.step, *got[3:7]) == (want.kind, want.step, *want[3:7]):
                return frame
            self.lose(edge, f"protocol error: {_place(got)} arrived instead of {_place(want)}")
        return None

    def _file(self, edge: Edge, frame: Frame) -> None:
        number, header = self.generation, frame.header
        if header.generation > number:
            raise ProtocolError(f"frame of generation {header.generation}, this is {number}")
        if header.generation < edge.generation:
            raise ProtocolError(
                f"frame of generation {header.generation} on an edge of {edge.generation}"
            )
        is_data = header.kind in DATA_KINDS
        group = edge.frames
        if header.generation < number or (is_data and header.step < group.current_step):
            return
        if is_data:
            edge.put(frame)
        elif len(group.step_frames) >= _MAX_STEP_FRAMES:
            raise ProtocolError(f"more than {_MAX_STEP_FRAMES} step frames wait")
        else:
            group.step_frames.append(StepFrame(edge.peer, frame))

    def _clear_inbox(self, edge: Edge) -> None:
        edge.inbox.clear()
        edge.inbox_bytes = 0


def _place(header: FrameHeader) -> str:
    return (
        f"{header.kind.name} of step {header.step} bank {header.bank} exchange {header.exchange} "
        f"micro-batch {header.micro_batch} flags {header.flags}"
    )
