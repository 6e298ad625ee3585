"""The worker's one place for data-plane sockets: listener, edges, wake-up, one select loop.

There is no I/O thread. The data thread runs the loop whenever it waits for something, and it is
the only one that may call anything here but ``wake`` and ``interrupt``. An attention rank i opens
the connections to every expert rank and to the attention ranks below i; one TCP connection a pair
carries step frames and data frames.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from cluster.errors import GenerationChangedError, PeerLostError, ProtocolError
from cluster.topology import Generation, Member, Role
from workers.dist.doorman import Doorman
from workers.dist.edge import Edge
from workers.dist.frames import DATA_KINDS, Frame, FrameHeader, FrameKind
from workers.dist.handshake import PeerIdentity
from workers.dist.pending import Pending

logger = logging.getLogger(__name__)

_MAX_STEP_FRAMES = 4096
_OPEN_SLICE_S = 0.1
_READ = selectors.EVENT_READ
_WRITE = selectors.EVENT_WRITE


class StepFrame(NamedTuple):
    """A proposal or a header as it came in."""

    sender: PeerIdentity
    """Who sent it."""
    frame: Frame
    """The frame."""


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
        self.current_step = 0
        """Data frames of an earlier step are dropped."""
        self.edges: dict[str, Edge] = {}
        """Open edges by the peer's worker name."""
        self.step_frames: deque[StepFrame] = deque()
        """Proposals and headers of the current generation, for the step channel."""
        self.num_wakeups = 0
        """Times that the select loop woke up."""
        self.num_stale_frames = 0
        """Frames of an older generation or step that were dropped."""
        self._max_data_bytes = max_data_bytes
        self._max_inbox_bytes = 4 * max_data_bytes
        self._connect_timeout_s = connect_timeout_s
        self._members: dict[str, Member] = {}
        self._lost: dict[str, str] = {}
        self._early: dict[str, Edge] = {}
        self._opening = False
        self._closed = False
        self._announced = 0
        self._woken = False
        self._selector = selectors.DefaultSelector()
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
        self._selector.register(self._wake_in, _READ, self._drain_wake)

    @property
    def address(self) -> str:
        """``host:port`` of the listener: ``Member.data_address``."""
        return self._doorman.address

    @property
    def num_refused(self) -> int:
        """Connections that did not become an edge."""
        return self._doorman.num_refused

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
        for name, reason in self._lost.items():
            raise PeerLostError(name, reason)

    def apply_generation(self, generation: Generation) -> None:
        """Take a membership: close edges to those that left, keep the others, open what lacks.

        Returns when every edge is open. Raises ``PeerLostError`` if one does not open in time,
        ``HandshakeError`` if a peer refuses us, ``GenerationChangedError`` if a newer generation
        is announced meanwhile.
        """
        self.generation = generation
        self._members = {m.name: m for m in generation.members if self._shares_edge(m)}
        self._lost.clear()
        self.step_frames.clear()
        self._doorman.begin_generation(generation.number)
        for name, edge in list(self.edges.items()):
            if name in self._members:
                self._clear_inbox(edge)
            else:
                self._forget(edge)
        for name, edge in list(self._early.items()):
            if edge.generation <= generation.number:
                del self._early[name]
                self._adopt(edge)
        self._opening = True  # an edge that breaks now is opened again
        try:
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
            self._lose(edge, f"cannot send: {err.strerror or err}")
            self.check()
        self._watch(edge)
        if edge.out_bytes > self._max_inbox_bytes:
            self.wait(
                lambda: edge.out_bytes <= self._max_inbox_bytes,
                lambda: [name],
                what="it takes no data",
            )

    def receive(self, name: str, want: FrameHeader, deadline: float) -> Frame:
        """The next data frame from a peer, which must be the one that ``want`` describes.

        Only kind, step, bank, exchange, micro-batch and flags are compared. Raises
        ``PeerLostError`` when the edge breaks, carries something else, or ``deadline`` passes.
        """
        edge = self._edge(name)
        frame = self._take(edge, want)
        if frame is None:
            self._read(edge)
            self.check()
            frame = self._take(edge, want)
        while frame is None:
            left = deadline - time.monotonic()
            if left <= 0:
                self.check()
                raise PeerLostError(name, f"no {want.kind.name} frame for step {want.step} in time")
            self._pump(left)
            self.check()
            frame = self._take(edge, want)
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
                names = missing()
                reason = f"{what} within {limit:g} s"
                others = f" (nor from {', '.join(names[1:])})" if len(names) > 1 else ""
                raise PeerLostError(names[0] if names else "a peer", reason + others)
            self._pump(min(left, slice_s))

    def poll(self, timeout_s: float = 0.0) -> None:
        """Run the loop once, for at most ``timeout_s``; raises as ``check`` does."""
        self.check()
        self._pump(timeout_s)
        self.check()

    def reject(self, name: str, reason: str) -> NoReturn:
        """Close an edge whose peer sent nonsense. Raises ``PeerLostError``."""
        edge = self.edges.get(name)
        if edge is not None:
            self._lose(edge, f"protocol error: {reason}")
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
        return member.name != self.me.name and "attention" in (member.role, self.me.role)

    def _connects_to(self, member: Member) -> bool:
        return self.me.role == "attention" and (
            member.role == "expert" or member.rank < self.me.rank
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
        old = self.edges.get(edge.name)
        if old is not None:
            self._forget(old)
        self._lost.pop(edge.name, None)
        self.edges[edge.name] = edge
        self._watch(edge)

    def _watch(self, edge: Edge) -> None:
        wanted = _READ if edge.inbox_bytes <= self._max_inbox_bytes else 0
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

    def _forget(self, edge: Edge) -> None:
        if edge.interest:
            self._selector.unregister(edge.sock)
            edge.interest = 0
        self._clear_inbox(edge)
        edge.close()
        if self.edges.get(edge.name) is edge:
            del self.edges[edge.name]

    def _lose(self, edge: Edge, reason: str) -> None:
        logger.warning("%s: edge to %s closed: %s", self.me.name, edge.name, reason)
        self._forget(edge)
        if not self._opening:
            self._lost.setdefault(edge.name, reason)

    def _clear_inbox(self, edge: Edge) -> None:
        self.num_stale_frames += len(edge.inbox)
        edge.inbox.clear()
        edge.inbox_bytes = 0
        if edge.interest:
            self._watch(edge)

    def _read(self, edge: Edge) -> None:
        """Take in one frame if it is there."""
        try:
            frame = edge.read()
            if frame is not None:
                self._file(edge, frame)
        except ProtocolError as err:
            self._lose(edge, f"protocol error: {err}")
        except OSError as err:
            self._lose(edge, str(err.strerror or err))
        if edge.interest:
            self._watch(edge)

    def _file(self, edge: Edge, frame: Frame) -> None:
        header = frame.header
        if header.generation > self.generation.number:
            raise ProtocolError(
                f"frame of generation {header.generation}, this is {self.generation.number}"
            )
        if header.generation < edge.generation:
            raise ProtocolError(
                f"frame of generation {header.generation} on an edge of {edge.generation}"
            )
        is_data = header.kind in DATA_KINDS
        if header.generation < self.generation.number or (
            is_data and header.step < self.current_step
        ):
            self.num_stale_frames += 1
        elif is_data:
            edge.put(frame)
        elif len(self.step_frames) >= _MAX_STEP_FRAMES:
            raise ProtocolError(f"more than {_MAX_STEP_FRAMES} step frames wait")
        else:
            self.step_frames.append(StepFrame(edge.peer, frame))

    def _take(self, edge: Edge, want: FrameHeader) -> Frame | None:
        while edge.inbox:
            frame = edge.pop()
            self._watch(edge)
            got = frame.header
            if got.step < want.step:
                self.num_stale_frames += 1
                continue
            if got[3:7] == want[3:7] and got.kind == want.kind and got.step == want.step:
                return frame
            self._lose(edge, f"protocol error: {_place(got)} came instead of {_place(want)}")
            self.check()
        return None

    # The loop.

    def _pump(self, timeout_s: float) -> None:
        deadline = self._doorman.next_deadline
        if deadline is not None:
            timeout_s = min(timeout_s, max(deadline - time.monotonic(), 0.0))
        events = self._selector.select(timeout_s)
        self.num_wakeups += 1
        for key, mask in events:
            if isinstance(key.data, Edge):
                self._serve(key.data, mask)
            elif isinstance(key.data, Pending):
                self._doorman.advance(key.data)
            else:
                key.data()
        if deadline is not None:
            self._doorman.expire()

    def _serve(self, edge: Edge, mask: int) -> None:
        if mask & _WRITE and edge.interest:
            try:
                edge.flush()
            except OSError as err:
                self._lose(edge, f"cannot send: {err.strerror or err}")
                return
            self._watch(edge)
        if mask & _READ and edge.interest:
            self._read(edge)

    def _drain_wake(self) -> None:
        self._wake_in.recv(4096)

    def _refusal(self, peer: PeerIdentity) -> str | None:
        """Listener: why this peer, which knows the token, cannot have an edge."""
        number = self.generation.number
        if peer.generation < number:
            return f"generation of {peer.name} is {peer.generation}, {self.me.name} is in {number}"
        if peer.role != "attention" or peer.name == self.me.name:
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
        kinds = {FrameKind.PROPOSAL, FrameKind.HEADER}
        if self.me.role == "expert":
            kinds = {FrameKind.ROWS, FrameKind.HEADER}
        elif peer.role == "expert":
            kinds = {FrameKind.OUTPUTS}
        edge = Edge(
            sock,
            peer,
            generation=generation,
            kinds=frozenset(kinds),
            max_data_bytes=self._max_data_bytes,
        )
        if generation > self.generation.number:
            if peer.name in self._early:
                self._early.pop(peer.name).close()
            self._early[peer.name] = edge  # adopted by apply_generation
        else:
            self._adopt(edge)


def _place(header: FrameHeader) -> str:
    return (
        f"{header.kind.name} of step {header.step} bank {header.bank} exchange {header.exchange} "
        f"micro-batch {header.micro_batch} flags {header.flags}"
    )
