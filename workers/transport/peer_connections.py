"""All data-plane sockets of a worker: listener, edges, wake-up, one select loop.

There is no I/O thread: the data thread runs the loop whenever it waits. Only ``wake``,
``interrupt`` and ``leave`` may be called by other threads. An attention rank i opens
the connections to every expert worker and to the attention ranks below i (colocated workers are
attention ranks); one TCP connection a pair carries step frames and data frames, both ways.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from cluster.core.errors import GenerationChangedError, PeerLostError
from cluster.core.topology import Generation, Member, Role, holds_experts, runs_attention
from workers.native.frames import WaitingFields
from workers.transport.acceptor import Acceptor, Pending
from workers.transport.direct import DirectEdges
from workers.transport.edge import Edge
from workers.transport.edge_table import EdgeTable
from workers.transport.frames import Frame, FrameHeader, FrameKind
from workers.transport.handshake import PeerIdentity
from workers.transport.path_watch import LOOK_S
from workers.transport.socket_io import WakePipe

_EpollSelector = getattr(selectors, "EpollSelector", type(None))  # Linux has one
_OPEN_SLICE_S = 0.1
_DRAIN_ROUNDS = 100
_SPIN_S = 1e-3
"""How long a worker on a host with a spare core looks for the frames of an exchange before it
sleeps. Dispatch and combine of one row between two processes take 40 us then, and 130 us with
sleep, on two cores of an AMD EPYC that do nothing else. With the gateway on them, the decode rate
over HTTP at batch 1 / 8 / 32 is 1.36 / 1.16 / 1.15 times as high without spinning."""
_INBOX_FRAMES = 4
"""Largest data frames that may wait in an inbox, or to be sent, before the peer is held back."""


class PeerConnections:
    """All data-plane connections of one worker."""

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

        ``max_data_bytes`` bounds a data frame (``frames.max_data_bytes``). A peer whose host
        acknowledges nothing for ``path_limit_s`` is lost. ``num_threads``: with which each worker
        of the host computes.
        """
        self.me = me
        self.step_timeout_s = step_timeout_s
        self.generation = Generation(number=0, members=())
        self._max_data_bytes = max_data_bytes
        self._connect_timeout_s = connect_timeout_s
        self._num_threads = num_threads
        self._members: dict[str, Member] = {}
        self._early: dict[str, Edge] = {}
        self._opening = False
        self._closed = False
        self._announced = 0
        self._left = -1
        self._woken = False
        self.awaited: tuple[str, ...] = ()
        """Peers for which the data thread waits now. Any thread may read it."""
        self._selector = selectors.DefaultSelector()
        self._table = EdgeTable(
            self._selector, me.name, _INBOX_FRAMES * max_data_bytes, path_limit_s
        )
        self._look_at = 0.0
        self._acceptor = Acceptor(
            self._selector,
            me,
            token,
            host=host,
            port=port,
            timeout_s=connect_timeout_s,
            answer_limit_s=min(path_limit_s, connect_timeout_s),
            refusal=self._refusal,
            opened=self._opened,
        )
        self.address = self._acceptor.address
        """``host:port`` of the listener: ``Member.data_address``."""
        self.edges = self._table.edges
        """Open edges by the peer's worker name."""
        self.step_frames = self._table.step_frames
        """Proposals and headers of the current generation, for the step channel."""
        self._wakeup = WakePipe()
        self._interrupts = WakePipe()
        for pipe in (self._wakeup, self._interrupts):
            self._selector.register(pipe, selectors.EVENT_READ, pipe.drain)

    # Thread-safe calls.

    def wake(self) -> None:
        """End the current or next ``StepChannel.wait``."""
        self._woken = True
        self._wakeup.ring()

    def interrupt(self, generation: int) -> None:
        """Make waits raise until an announced generation is applied."""
        self._announced = max(self._announced, generation)
        self._interrupts.ring()

    def leave(self, generation: int) -> None:
        """Make the waits of steps raise until a later generation is applied."""
        self._left = max(self._left, generation)
        self._interrupts.ring()

    # Everything below: data thread only.

    def take_wake(self) -> bool:
        """Whether ``wake`` was called since the last time."""
        woken, self._woken = self._woken, False
        return woken

    def check(self) -> None:
        """Raise ``GenerationChangedError`` or ``PeerLostError`` if there is a reason to."""
        if self._announced > self.generation.number:
            raise GenerationChangedError(f"generation {self._announced} was announced")
        if self._left >= self.generation.number and not self._opening:
            raise GenerationChangedError(f"generation {self.generation.number} was left")
        if self._table.lost and not self._opening:
            raise PeerLostError(*next(iter(self._table.lost.items())))

    def apply_generation(self, generation: Generation) -> None:
        """Follow a membership: close edges to former members, keep the others, open missing ones.

        Returns when every edge is open. Raises ``PeerLostError`` if one does not open in time or a
        peer refuses us, ``GenerationChangedError`` if a newer generation is announced meanwhile,
        or a peer is in one already.
        """
        self.generation = generation
        self._members = {m.name: m for m in generation.members if self._shares_edge(m)}
        self._acceptor.begin_generation(generation.number)
        self._table.begin_generation(generation.number, frozenset(self._members))
        for name, edge in list(self._early.items()):
            if edge.generation <= generation.number:
                del self._early[name]
                self._add_edge(edge)
        self._opening = True  # a kept edge that breaks now is opened again
        try:
            self._drain()
            self.wait(
                self._open_missing,
                lambda: [n for n in self._members if n not in self.edges],
                timeout_s=self._connect_timeout_s,
                what="no edge",
                slice_s=_OPEN_SLICE_S,
            )
        finally:
            self._opening = False

    def send(self, name: str, header: FrameHeader, parts: Sequence[memoryview | bytes]) -> None:
        """Send a frame; bytes that the kernel does not take go out during later waits.

        Blocks only while more than a few frames wait for that peer, reading all the while. Raises
        ``PeerLostError`` if the edge is gone.
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
                what="it takes no data",
            )

    def receive(
        self, name: str, want: FrameHeader, deadline: float, others: Sequence[str] = ()
    ) -> Frame:
        """The next data frame from a peer, which must be the one that ``want`` describes.

        Only kind, step, bank, exchange, micro-batch and flags are compared. Raises
        ``PeerLostError`` when the edge breaks, carries something else, or ``deadline`` passes;
        the reason then names those of ``others`` that are missing too.
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
                    raise _timed_out(missing, f"no {want.kind.name} of step {want.step} in time")
                self.awaited = missing
                self._pump(left)
                frame = self._table.take(edge, want) if edge.inbox else None
        return frame

    @contextlib.contextmanager
    def awaiting(self, *names: str) -> Iterator[None]:
        """The data thread waits for these peers."""
        self.awaited = names
        try:
            yield
        finally:
            self.awaited = ()

    def direct(self, names: Sequence[str]) -> DirectEdges | None:
        """The edges to some peers, for native code; None where one is missing, or no epoll."""
        edges = [self.edges[name] for name in names if name in self.edges]
        if len(edges) < len(names) or not isinstance(self._selector, _EpollSelector):
            return None
        waiting = WaitingFields(
            epoll=self._selector.fileno(),
            wake=self._wakeup.fileno(),
            limit_ms=round(1000 * LOOK_S),
            spin_ns=round(1e9 * _SPIN_S) if self._has_spare_core() else 0,
        )
        return DirectEdges(self._table, edges, waiting, self._check_all)

    def wait(
        self,
        ready: Callable[[], bool],
        missing: Callable[[], list[str]],
        *,
        timeout_s: float | None = None,
        what: str = "no answer",
        slice_s: float = 3600.0,
    ) -> None:
        """Run the loop until ``ready``. ``missing`` names the peers to blame after the timeout."""
        limit = self.step_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        with self.awaiting():
            while True:
                self.check()
                if ready():
                    return
                left = deadline - time.monotonic()
                self.awaited = tuple(missing())
                if left <= 0:
                    raise _timed_out(self.awaited, f"{what} within {limit:g} s")
                self._pump(min(left, slice_s))

    def poll(self, timeout_s: float = 0.0) -> None:
        """Run the loop once, for at most ``timeout_s``; raises as ``check`` does."""
        self.check()
        self._pump(timeout_s)
        self.check()

    @property
    def is_settled(self) -> bool:
        """The hosts of all peers have acknowledged what was sent, when it was last looked at."""
        return self._table.is_settled

    def begin_step(self, step: int) -> None:
        """Data frames of earlier steps are dropped from now on."""
        self._table.current_step = step

    def rest(self, timeout_s: float, *, is_ready: bool = False) -> None:
        """Run the loop once although a peer is lost: for the time until the next generation.

        Before a generation for which this worker ``is_ready``, edges that break are opened again:
        a peer may have closed one that was kept here, and waits for another. Raises
        ``GenerationChangedError`` when the next generation has been announced, and what
        ``apply_generation`` raises.
        """
        if self._announced > self.generation.number:
            self.check()
        if is_ready and not self._open_missing():
            timeout_s = min(timeout_s, _OPEN_SLICE_S)
        self._pump(timeout_s)

    def reject(self, name: str, reason: str) -> NoReturn:
        """Close an edge whose peer sent invalid data. Raises ``PeerLostError``."""
        edge = self.edges.get(name)
        if edge is not None:
            self._table.lose(edge, f"protocol error: {reason}")
        raise PeerLostError(name, f"protocol error: {reason}")

    def close(self) -> None:
        """Close all connections, for good. Closing twice does no harm."""
        if self._closed:
            return
        self._closed = True
        self._acceptor.close()
        for edge in (*self.edges.values(), *self._early.values()):
            edge.close()
        self.edges.clear()
        self._early.clear()
        self._selector.close()
        self._wakeup.close()
        self._interrupts.close()

    # Edges.

    def _has_spare_core(self) -> bool:
        """This host has more cores than its workers compute with."""
        host, *others = (
            address.rpartition(":")[0]
            for address in (self.address, *(m.data_address for m in self.generation.members))
        )
        num_here = others.count(host)
        return num_here * self._num_threads < len(os.sched_getaffinity(0))

    def _shares_edge(self, member: Member) -> bool:
        has_attention = member.runs_attention or runs_attention(self.me.role)
        return member.name != self.me.name and has_attention

    def _edge(self, name: str) -> Edge:
        self.check()
        edge = self.edges.get(name)
        if edge is None:
            raise PeerLostError(name, "no edge to it is open")
        return edge

    def _add_edge(self, edge: Edge) -> None:
        """Use an authenticated connection as the edge to its peer, if that is a member."""
        if not self._is_member(edge.peer):
            self._acceptor.refuse(edge.name, f"not a member of generation {self.generation.number}")
            edge.close()
            return
        self._table.add(edge)

    # The loop.

    def _drain(self) -> None:
        """Read what has arrived, which reveals kept edges that are broken."""
        for _ in range(_DRAIN_ROUNDS):
            if not self._pump(0.0):
                return

    def _pump(self, timeout_s: float) -> int:
        """Wait once; returns the number of sockets that were ready."""
        deadline = self._acceptor.next_deadline
        if deadline is not None:
            timeout_s = min(timeout_s, max(deadline - time.monotonic(), 0.0))
        if not self._table.is_settled:
            timeout_s = min(timeout_s, LOOK_S)
        events = self._selector.select(timeout_s)
        for key, mask in events:
            if isinstance(key.data, Edge):
                self._table.serve(key.data, mask)
            elif isinstance(key.data, Pending):
                self._acceptor.advance(key.data)
            else:
                key.data()
        if deadline is not None:
            self._acceptor.expire()
        self._look()
        return len(events)

    def _look(self) -> None:
        """Look at the paths if it is time."""
        if not self._table.is_settled and (now := time.monotonic()) >= self._look_at:
            self._look_at = now + LOOK_S
            self._table.look(now)

    def _check_all(self) -> None:
        self._look()
        self.check()

    def _refusal(self, peer: PeerIdentity) -> str | None:
        """Listener: why this peer, which knows the token, cannot have an edge."""
        number = self.generation.number
        if peer.generation < number:
            return f"generation of {peer.name} is {peer.generation}, {self.me.name} is in {number}"
        if not runs_attention(peer.role) or peer.name == self.me.name:
            return f"{peer.name} must not connect to {self.me.name}"
        if peer.generation == number and not self._is_member(peer):
            return f"{peer.name} rank {peer.rank} is not a member of generation {number}"
        return None

    def _is_member(self, peer: PeerIdentity) -> bool:
        member = self._members.get(peer.name)
        return member is not None and (member.role, member.rank) == (peer.role, peer.rank)

    def _open_missing(self) -> bool:
        """Open the edges that this side must open; True when all edges are open."""
        missing = [m for m in self._members.values() if m.name not in self.edges]
        for member in missing if runs_attention(self.me.role) else ():
            if not member.runs_attention or member.rank < self.me.rank:
                self._acceptor.connect(member)
        return not missing

    def _opened(self, sock: socket.socket, peer: PeerIdentity, generation: int) -> None:
        """Take an edge from the acceptor; its generation may not be known here yet."""
        edge = Edge(
            sock,
            peer,
            generation=generation,
            kinds=_kinds_between(peer.role, self.me.role),
            max_data_bytes=self._max_data_bytes,
        )
        if generation > self.generation.number:
            if peer.name in self._early:
                self._early.pop(peer.name).close()
            self._early[peer.name] = edge  # until apply_generation takes it
        else:
            self._add_edge(edge)


def _kinds_between(sender: Role, receiver: Role) -> frozenset[FrameKind]:
    """What a worker of one role may send to a worker of another."""
    kinds: set[FrameKind] = set()
    if runs_attention(sender):
        kinds.add(FrameKind.HEADER)
        if runs_attention(receiver):
            kinds.add(FrameKind.PROPOSAL)
        if holds_experts(receiver):
            kinds.add(FrameKind.ROWS)
    if holds_experts(sender) and runs_attention(receiver):
        kinds.add(FrameKind.OUTPUTS)
    return frozenset(kinds)


def _timed_out(missing: Sequence[str], reason: str) -> PeerLostError:
    """An error for the first of the missing peers; its reason names the others."""
    others = f" (nor from {', '.join(missing[1:])})" if len(missing) > 1 else ""
    return PeerLostError(missing[0] if missing else "a peer", reason + others)
