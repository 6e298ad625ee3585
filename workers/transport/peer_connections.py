"""All data-plane sockets of a worker: listener, edges, wake-up pipe and one select loop.

There is no I/O thread: the data thread runs the loop whenever it waits. Other threads may call only
``wake``, ``interrupt`` and ``leave``. An edge is one TCP connection between two workers, for step
frames and data frames in both directions. ``EdgeRules`` decides which workers share an edge.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

from cluster.core.errors import PeerLostError
from cluster.core.topology import Generation, runs_attention
from workers.native.frames import WaitingFields
from workers.transport.acceptor import Acceptor
from workers.transport.direct import DirectEdges
from workers.transport.edge import Edge, StepFrame
from workers.transport.edge_rules import EdgeRules
from workers.transport.edge_table import EdgeTable
from workers.transport.frames import Frame, FrameHeader
from workers.transport.handshake import PeerIdentity
from workers.transport.interrupts import Interrupts
from workers.transport.path_watch import LOOK_S
from workers.transport.select_loop import SelectLoop, timed_out

_EpollSelector = getattr(selectors, "EpollSelector", type(None))  # Linux has one
_OPEN_SLICE_S = 0.1
_SPIN_S = 1e-3
"""Seconds for which a worker on a host with a spare core polls for the frames of an exchange before
it sleeps. With polling, dispatch and combine of one row between two processes take 40 us, without
polling 130 us, on two otherwise idle cores of an AMD EPYC. If the gateway runs on the same cores,
the decode rate over HTTP at batch 1 / 8 / 32 is 1.36 / 1.16 / 1.15 times as high without
polling."""
_INBOX_FRAMES = 4
"""Maximum size of an inbox or send queue, in data frames of the largest size."""


class PeerConnections:
    """All data-plane connections of one worker, with the listener and the loop that waits for them.

    Data thread only, except ``wake``, ``interrupt`` and ``leave``, which any thread may call.
    """

    def __init__(
        self,
        me: PeerIdentity,
        token: str,
        *,
        max_data_bytes: int,
        host: str = "127.0.0.1",
        port: int = 0,
        connect_timeout_s: float = 10.0,
        step_timeout_s: float = 60.0,
        path_limit_s: float = 2.0,
        num_threads: int = 1,
    ) -> None:
        """Open the listener on ``host`` (the cluster interface), by default on a free port.

        ``max_data_bytes``: limit of a data frame (``frames.max_data_bytes``). A peer is lost if its
        host acknowledges nothing for ``path_limit_s``. ``num_threads``: number of compute threads
        of each worker on the host.
        """
        self.me = me
        self.step_timeout_s = step_timeout_s
        self.generation = Generation(number=0, members=())
        self._max_data_bytes = max_data_bytes
        self._connect_timeout_s = connect_timeout_s
        self._num_threads = num_threads
        self._early: dict[str, Edge] = {}
        self._opening = False
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._table = EdgeTable(
            self._selector, me.name, _INBOX_FRAMES * max_data_bytes, path_limit_s
        )
        self._rules = EdgeRules(me)
        self._acceptor = Acceptor(
            self._selector,
            me,
            token,
            host=host,
            port=port,
            timeout_s=connect_timeout_s,
            answer_limit_s=min(path_limit_s, connect_timeout_s),
            refusal=self._rules.refusal,
            opened=self._opened,
        )
        self.address = self._acceptor.address
        """``host:port`` of the listener, which peers use as ``Member.data_address``."""
        self.edges = self._table.edges
        """Open edges by the peer's worker name."""
        self._interrupts = interrupts = Interrupts(self._selector)
        self.wake, self.take_wake = interrupts.wake, interrupts.take_wake
        self.interrupt, self.leave = interrupts.interrupt, interrupts.leave
        self.loop = loop = SelectLoop(
            self._selector, self._table, self._acceptor, self.check, step_timeout_s
        )
        """Loop in which the data thread waits for sockets and handles the ready ones."""
        self.wait, self.poll, self.awaiting = loop.wait, loop.poll, loop.awaiting

    # Data thread only, except ``wake``, ``interrupt`` and ``leave``.

    def check(self) -> None:
        """Raise ``GenerationChangedError`` or ``PeerLostError`` if waits must end."""
        self._interrupts.check_announced(self.generation.number)
        if self._opening:
            return
        self._interrupts.check_left(self.generation.number)
        if self._table.lost:
            raise PeerLostError(*next(iter(self._table.lost.items())))

    def apply_generation(self, generation: Generation) -> None:
        """Close edges to former members, keep edges to other members, and open missing edges.

        Returns when every edge is open. Raises ``PeerLostError`` if an edge does not open in time
        or a peer refuses this worker, and ``GenerationChangedError`` if a newer generation is
        announced during the call, or a peer is already in a newer generation.
        """
        self.generation = generation
        names = self._rules.begin_generation(generation)
        self._acceptor.begin_generation(generation.number)
        groups: dict[str, int] = {}
        if not runs_attention(self.me.role):  # only then do peers belong to several groups
            groups = {m.name: i for i, own in enumerate(generation.groups) for m in own}
        self._table.begin_generation(generation.number, names, groups)
        for name, edge in list(self._early.items()):
            if edge.generation <= generation.number:
                del self._early[name]
                self._add_edge(edge)
        self._opening = True  # a kept edge that breaks now is opened again
        try:
            self.loop.drain()
            self.wait(
                self._open_missing,
                lambda: [member.name for member in self._rules.missing(self.edges)],
                timeout_s=self._connect_timeout_s,
                what="no edge",
                slice_s=_OPEN_SLICE_S,
            )
        finally:
            self._opening = False

    def send(self, name: str, header: FrameHeader, parts: Sequence[memoryview | bytes]) -> None:
        """Send a frame to the worker ``name``.

        Bytes that the kernel does not accept at once are sent during later waits. Blocks, while
        reading from all peers, if more than ``_INBOX_FRAMES`` frames of maximum size are queued for
        the worker. Raises ``PeerLostError`` if the edge is lost, and ``GenerationChangedError``.
        """
        edge = self._edge(name)
        try:
            edge.send([header.encode(), *parts])
        except OSError as err:
            self._table.lose(edge, f"cannot send: {err.strerror or err}")
            self.check()
        self._table.sent(edge)
        limit = self._table.max_inbox_bytes
        if edge.out_bytes > limit:
            self.wait(
                lambda: edge.out_bytes <= limit,
                lambda: [name],
                what="it reads no data",
            )

    def receive(
        self, name: str, want: FrameHeader, deadline: float, others: Sequence[str] = ()
    ) -> Frame:
        """Wait for the next data frame from the worker ``name``; the frame must match ``want``.

        Only kind, step, bank, exchange, micro-batch and flags are compared. ``deadline``: monotonic
        time. Raises ``PeerLostError`` if the edge breaks or carries a different frame, or after the
        deadline; in this case the reason also names the workers of ``others`` without a frame.
        Raises ``GenerationChangedError`` if the generation ends.
        """
        edge = self._edge(name)
        frame = self._table.take(edge, want) if edge.inbox else None
        if frame is None:
            self._table.read(edge)
            frame = self._table.take(edge, want) if edge.inbox else None
        if frame is not None:
            return frame
        with self.awaiting(name):
            while frame is None:
                self.check()
                missing = (name, *(n for n in others if not self._edge(n).inbox))
                left = deadline - time.monotonic()
                if left <= 0:
                    raise timed_out(missing, f"no {want.kind.name} of step {want.step} in time")
                self.loop.awaited = missing
                self.loop.run_once(left)
                frame = self._table.take(edge, want) if edge.inbox else None
        return frame

    def direct(self, names: Sequence[str]) -> DirectEdges | None:
        """Return the edges to the workers ``names`` in the form that native code uses.

        None if an edge is missing or the system lacks epoll.
        """
        edges = [self.edges[name] for name in names if name in self.edges]
        if len(edges) < len(names) or not isinstance(self._selector, _EpollSelector):
            return None
        waiting = WaitingFields(
            epoll=self._selector.fileno(),
            wake=self._interrupts.wakeup.fileno(),
            limit_ms=round(1000 * LOOK_S),
            spin_ns=round(1e9 * _SPIN_S) if self._has_spare_core() else 0,
        )
        return DirectEdges(self._table, edges, waiting, self._check_all)

    @property
    def is_settled(self) -> bool:
        """Whether the peers' hosts had acknowledged all sent bytes when they were last checked."""
        return self._table.is_settled

    def step_frames(self, group: int = 0) -> deque[StepFrame]:
        """Return the queue of received step proposals and headers of a step group."""
        return self._table.group(group).step_frames

    def begin_step(self, step: int, group: int = 0) -> None:
        """Set the number of a step group's current step. Its data frames of earlier steps are
        dropped."""
        self._table.group(group).current_step = step

    def poll_idle(self, timeout_s: float, *, is_ready: bool = False) -> None:
        """Run the loop once, for at most ``timeout_s``, even if a peer is lost.

        Call it while no step can run, until the next generation. If this worker ``is_ready`` for
        the current generation, the call opens broken edges again: a peer may have closed an edge
        that this worker kept, and may be waiting for a new edge. Raises ``GenerationChangedError``
        if the next generation was announced, and the errors of ``apply_generation``.
        """
        self._interrupts.check_announced(self.generation.number)
        if is_ready and not self._open_missing():
            timeout_s = min(timeout_s, _OPEN_SLICE_S)
        self.loop.run_once(timeout_s)

    def reject(self, name: str, reason: str) -> NoReturn:
        """Close the edge to a worker that sent invalid data. Raises ``PeerLostError``."""
        edge = self.edges.get(name)
        if edge is not None:
            self._table.lose(edge, f"protocol error: {reason}")
        raise PeerLostError(name, f"protocol error: {reason}")

    def close(self) -> None:
        """Close all connections and the listener. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._acceptor.close()
        for edge in (*self.edges.values(), *self._early.values()):
            edge.close()
        self.edges.clear()
        self._early.clear()
        self._selector.close()
        self._interrupts.close()

    # Edges.

    def _has_spare_core(self) -> bool:
        """Whether this host has more cores than all workers on it use for compute threads."""
        host, *others = (
            address.rpartition(":")[0]
            for address in (self.address, *(m.data_address for m in self.generation.members))
        )
        num_here = others.count(host)
        return num_here * self._num_threads < len(os.sched_getaffinity(0))

    def _edge(self, name: str) -> Edge:
        self.check()
        edge = self.edges.get(name)
        if edge is None:
            raise PeerLostError(name, "no edge to it is open")
        return edge

    def _add_edge(self, edge: Edge) -> None:
        """Use an authenticated connection as the edge to its peer, if the peer is a member."""
        if not self._rules.is_member(edge.peer):
            self._acceptor.refuse(edge.name, f"not a member of generation {self.generation.number}")
            edge.close()
            return
        self._table.add(edge)

    def _check_all(self) -> None:
        self.loop.look()
        self.check()

    def _open_missing(self) -> bool:
        """Begin to open missing edges that this side must open; return whether all are open."""
        missing = self._rules.missing(self.edges)
        for member in filter(self._rules.opens, missing):
            self._acceptor.connect(member)
        return not missing

    def _opened(self, sock: socket.socket, peer: PeerIdentity, generation: int) -> None:
        """Accept a new edge, which may be for a generation that this worker has not applied yet."""
        edge = Edge(
            sock,
            peer,
            generation=generation,
            kinds=self._rules.kinds_from(peer.role),
            max_data_bytes=self._max_data_bytes,
        )
        if generation > self.generation.number:
            if peer.name in self._early:
                self._early.pop(peer.name).close()
            self._early[peer.name] = edge  # until apply_generation takes it
        else:
            self._add_edge(edge)
