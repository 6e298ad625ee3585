"""The worker's one place for data-plane sockets: listener, edges, wake-up, one select loop.

There is no I/O thread. The data thread runs the loop whenever it waits for something, and it is
the only one that may call anything here but ``wake`` and ``interrupt``. An attention rank i opens
the connections to every expert worker and to the attention ranks below i (colocated workers are
attention ranks); one TCP connection a pair carries step frames and data frames, both ways.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn

from cluster.errors import GenerationChangedError, PeerLostError, ProtocolError
from cluster.topology import Generation, Member, Role, holds_experts, runs_attention
from workers.dist.doorman import Doorman
from workers.dist.edge import Edge
from workers.dist.edge_table import EdgeTable, StepFrame
from workers.dist.frames import Frame, FrameHeader, FrameKind
from workers.dist.handshake import PeerIdentity
from workers.dist.pending import Pending

_OPEN_SLICE_S = 0.1
_DRAIN_ROUNDS = 100
_INBOX_FRAMES = 4
"""Largest data frames that may wait in an inbox, or to be sent, before the peer is held back."""


class PeerHub:
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
        max_pending: int = 16,
    ) -> None:
        """Open the listener on ``host`` (the cluster interface), by default on a free port.

        ``max_data_bytes`` bounds a data frame (``frames.max_data_bytes``); at most ``max_pending``
        connections that have not proved the token are kept, the oldest gives way.
        """
        self.me = me
        self.step_timeout_s = step_timeout_s
        self.generation = Generation(number=0, members=())
        self.num_wakeups = 0
        """Times that the select loop woke up."""
        self._max_data_bytes = max_data_bytes
        self._connect_timeout_s = connect_timeout_s
        self._members: dict[str, Member] = {}
        self._early: dict[str, Edge] = {}
        self._opening = False
        self._closed = False
        self._announced = 0
        self._woken = False
        self._selector = selectors.DefaultSelector()
        self._table = EdgeTable(self._selector, me.name, _INBOX_FRAMES * max_data_bytes)
        self._doorman = Doorman(
            self._selector,
            me,
            token,
            host=host,
            port=port,
            timeout_s=connect_timeout_s,
            max_pending=max_pending,
            refusal=self._refusal,
            opened=self._opened,
        )
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._drain_wake)

    @property
    def address(self) -> str:
        """``host:port`` of the listener: ``Member.data_address``."""
        return self._doorman.address

    @property
    def num_refused(self) -> int:
        """Connections that did not become an edge."""
        return self._doorman.num_refused

    @property
    def num_stale_frames(self) -> int:
        """Frames of an older generation or step that were dropped."""
        return self._table.num_stale_frames

    @property
    def edges(self) -> dict[str, Edge]:
        """Open edges by the peer's worker name."""
        return self._table.edges

    @property
    def step_frames(self) -> deque[StepFrame]:
        """Proposals and headers of the current generation, for the step channel."""
        return self._table.step_frames

    # Thread-safe calls.

    def wake(self) -> None:
        """End the current or next ``StepChannel.wait``."""
        self._woken = True
        self._ring()

    def interrupt(self, generation: int | None = None) -> None:
        """A generation was announced (None: the next one): waits raise until it is applied."""
        number = self.generation.number + 1 if generation is None else generation
        self._announced = max(self._announced, number)
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full of wake-ups already, or closed
            self._wake_out.send(b"w")

    # Everything below: data thread only.

    def take_wake(self) -> bool:
        """Whether ``wake`` was called since the last time."""
        woken, self._woken = self._woken, False
        return woken

    def member_name(self, role: Role, rank: int) -> str:
        """Worker name of a member of the generation. Raises ``ProtocolError`` if there is none."""
        for name, member in self._members.items():
            if member.role == role and member.rank == rank:
                return name
        raise ProtocolError(f"no {role} rank {rank} in generation {self.generation.number}")

    def check(self) -> None:
        """Raise ``GenerationChangedError`` or ``PeerLostError`` if there is a reason to."""
        if self._announced > self.generation.number:
            raise GenerationChangedError(f"generation {self._announced} was announced")
        for name, reason in self._table.lost.items():
            if not self._opening:
                raise PeerLostError(name, reason)

    def apply_generation(self, generation: Generation) -> None:
        """Take a membership: close edges to those that left, keep the others, open what lacks.

        Returns when every edge is open. Raises ``PeerLostError`` if one does not open in time,
        ``HandshakeError`` if a peer refuses us, ``GenerationChangedError`` if a newer generation
        is announced meanwhile.
        """
        self.generation = generation
        self._members = {m.name: m for m in generation.members if self._shares_edge(m)}
        self._doorman.begin_generation(generation.number)
        self._table.begin_generation(generation.number, frozenset(self._members))
        for name, edge in list(self._early.items()):
            if edge.generation <= generation.number:
                del self._early[name]
                self._adopt(edge)
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
        """Send a frame; what the kernel does not take goes out while this hub waits.

        Blocks only while more than a few frames wait for that peer, reading all the while. Raises
        ``PeerLostError`` if the edge is gone.
        """
        edge = self._edge(name)
        try:
            edge.send([header.encode(), *parts])
        except OSError as err:
            self._table.lose(edge, f"cannot send: {err.strerror or err}")
            self.check()
        self._table.watch(edge)
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
        the reason then tells which of ``others`` are missing too.
        """
        edge = self._edge(name)
        frame = self._table.take(edge, want)
        if frame is None:
            self.check()
            self._table.read(edge)
            frame = self._table.take(edge, want)
        while frame is None:
            self.check()
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [name, *(n for n in others if not self._edge(n).inbox)]
                raise _timed_out(missing, f"no {want.kind.name} of step {want.step} in time")
            self._pump(left)
            frame = self._table.take(edge, want)
        return frame

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
        while True:
            self.check()
            if ready():
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise _timed_out(missing(), f"{what} within {limit:g} s")
            self._pump(min(left, slice_s))

    def poll(self, timeout_s: float = 0.0) -> None:
        """Run the loop once, for at most ``timeout_s``; raises as ``check`` does."""
        self.check()
        self._pump(timeout_s)
        self.check()

    def begin_step(self, step: int) -> None:
        """Data frames of earlier steps are dropped from now on."""
        self._table.current_step = step

    def rest(self, timeout_s: float) -> None:
        """Run the loop once although a peer is lost: for the time until the next generation.

        Raises ``GenerationChangedError`` when that has been announced.
        """
        if self._announced > self.generation.number:
            self.check()
        self._pump(timeout_s)

    def reject(self, name: str, reason: str) -> NoReturn:
        """Close an edge whose peer sent nonsense. Raises ``PeerLostError``."""
        edge = self.edges.get(name)
        if edge is not None:
            self._table.lose(edge, f"protocol error: {reason}")
        raise PeerLostError(name, f"protocol error: {reason}")

    def close(self) -> None:
        """Close everything; the hub is not used again. Closing twice does no harm."""
        if self._closed:
            return
        self._closed = True
        self._doorman.close()
        for edge in (*self.edges.values(), *self._early.values()):
            edge.close()
        self.edges.clear()
        self._early.clear()
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    # Edges.

    def _shares_edge(self, member: Member) -> bool:
        has_attention = member.runs_attention or runs_attention(self.me.role)
        return member.name != self.me.name and has_attention

    def _connects_to(self, member: Member) -> bool:
        return runs_attention(self.me.role) and (
            not member.runs_attention or member.rank < self.me.rank
        )

    def _edge(self, name: str) -> Edge:
        self.check()
        edge = self.edges.get(name)
        if edge is None:
            raise PeerLostError(name, "no edge to it is open")
        return edge

    def _adopt(self, edge: Edge) -> None:
        """Make an authenticated connection the edge to its peer."""
        if not self._is_member(edge.peer):
            self._doorman.refuse(edge.name, f"not a member of generation {self.generation.number}")
            edge.close()
            return
        self._table.add(edge)

    # The loop.

    def _drain(self) -> None:
        """Take in what has arrived, so that kept edges that broke by now are known."""
        for _ in range(_DRAIN_ROUNDS):
            if not self._pump(0.0):
                return

    def _pump(self, timeout_s: float) -> int:
        """Wait once; returns the number of sockets that were ready."""
        deadline = self._doorman.next_deadline
        if deadline is not None:
            timeout_s = min(timeout_s, max(deadline - time.monotonic(), 0.0))
        events = self._selector.select(timeout_s)
        self.num_wakeups += 1
        for key, mask in events:
            if isinstance(key.data, Edge):
                self._table.serve(key.data, mask)
            elif isinstance(key.data, Pending):
                self._doorman.advance(key.data)
            else:
                key.data()
        if deadline is not None:
            self._doorman.expire()
        return len(events)

    def _drain_wake(self) -> None:
        self._wake_in.recv(4096)

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
        """Connect where it is on us; True when all edges are open."""
        missing = [m for m in self._members.values() if m.name not in self.edges]
        for member in missing:
            if self._connects_to(member):
                self._doorman.connect(member)
        return not missing

    def _opened(self, sock: socket.socket, peer: PeerIdentity, generation: int) -> None:
        """The doorman has a new edge for us, maybe for a generation that we do not know yet."""
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
            self._early[peer.name] = edge  # adopted by apply_generation
        else:
            self._adopt(edge)


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
    """The first of the missing peers is the lost one, the reason tells the others."""
    others = f" (nor from {', '.join(missing[1:])})" if len(missing) > 1 else ""
    return PeerLostError(missing[0] if missing else "a peer", reason + others)
