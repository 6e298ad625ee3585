"""The virtual network: hosts, directed links with faults, and the order of what travels.

Everything that travels between two ends of one connection keeps its order, as in TCP: a link that
loses packets delays, it never drops a byte. A blackholed link keeps what is sent until it heals.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.simulation.kernel import Kernel

if TYPE_CHECKING:
    from tests.simulation.sockets import SimSocket
    from tests.simulation.streams import Half

BUFFER_BYTES = 1 << 18
"""Bytes that may be on their way, or unread, in one direction."""
WINDOW = 64
"""Messages of a gRPC stream, likewise."""
_FEW_BYTES = 64
_FEW_MESSAGES = 2
"""The same where buffers are full."""
_LATENCY_S = 80e-6
_LOCAL_S = 15e-6


@dataclass(slots=True)
class Link:
    """One direction between two hosts."""

    num_blocks: int = 0
    """Blackholes that have not ended."""
    num_delays: int = 0
    """Delays that have not ended."""
    delay_s: float = 0.0
    """More than the usual latency; that of the newest delay."""
    waiting: dict[Pipe, None] = field(default_factory=dict)
    """Pipes that hold something until the link heals."""


class Pipe:
    """One direction of one connection."""

    def __init__(self, network: Network, source: str, target: str) -> None:
        self._kernel = network.kernel
        self.link = network.link(source, target)
        self.target = target
        self._latency_s = _LOCAL_S if source == target else _LATENCY_S
        self._held: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._last_arrival = 0.0
        self.num_healed = 0
        """Times that the link has healed with something to send."""

    @property
    def is_held(self) -> bool:
        """Something waits for the link to heal."""
        return bool(self._held)

    def send(self, deliver: Callable[..., None], *args: Any) -> None:
        """Call ``deliver`` at the other end, after what was sent before."""
        if self.link.num_blocks or self._held:
            self._held.append((deliver, args))
            self.link.waiting[self] = None
        else:
            self._post(deliver, args)

    def flush(self) -> None:
        """The link has healed."""
        self.num_healed += 1
        while self._held:
            self._post(*self._held.popleft())

    def _post(self, deliver: Callable[..., None], args: tuple[Any, ...]) -> None:
        kernel = self._kernel
        latency_s = self._latency_s * (0.5 + 1.5 * kernel.rng.random()) + self.link.delay_s
        arrival = kernel.now + latency_s
        if arrival < self._last_arrival:  # the next one never overtakes
            arrival = self._last_arrival
        self._last_arrival = arrival
        kernel.at(arrival, deliver, *args)


class Network:
    """All links and listeners."""

    current: Network | None = None
    """The network of the simulation that runs in this Python process."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.listeners: dict[str, SimSocket] = {}
        """By ``host:port``."""
        self.services: dict[str, Any] = {}
        """Engine servers by ``host:port``."""
        self.by_fd: dict[int, SimSocket] = {}
        self.connections: dict[SimSocket, None] = {}
        """Connected ends of streams."""
        self.calls: dict[Half, None] = {}
        """Ends of gRPC streams at servers."""
        self._full_hosts: set[str] = set()
        self._links: dict[tuple[str, str], Link] = {}
        self._next_port = 20_000
        self._next_fd = 10

    def link(self, source: str, target: str) -> Link:
        found = self._links.get((source, target))
        if found is None:
            found = self._links[source, target] = Link()
        return found

    def new_address(self, host: str) -> str:
        self._next_port += 1
        return f"{host}:{self._next_port}"

    def new_fd(self) -> int:
        self._next_fd += 1
        return self._next_fd

    # ---- faults -----------------------------------------------------------------------------

    def block(self, source: str, target: str) -> None:
        """Blackhole one direction."""
        self.kernel.log("blackhole %s -> %s", source, target)
        self.link(source, target).num_blocks += 1

    def slow(self, source: str, target: str, delay_s: float) -> None:
        self.kernel.log("delay %s -> %s by %.3f s", source, target, delay_s)
        link = self.link(source, target)
        link.num_delays, link.delay_s = link.num_delays + 1, delay_s

    def quicken(self, source: str, target: str) -> None:
        """End a delay of one direction."""
        link = self.link(source, target)
        link.num_delays = max(link.num_delays - 1, 0)
        if link.num_delays == 0:
            link.delay_s = 0.0

    def heal(self, source: str, target: str) -> None:
        """End a blackhole of one direction; what waits arrives when there is none left."""
        link = self.link(source, target)
        if link.num_blocks == 1:
            self.kernel.log("heal %s -> %s", source, target)
        link.num_blocks = max(link.num_blocks - 1, 0)
        if link.num_blocks:
            return
        waiting, link.waiting = link.waiting, {}
        for pipe in waiting:
            pipe.flush()

    def heal_all(self) -> None:
        for (source, target), link in list(self._links.items()):
            link.num_blocks = min(link.num_blocks, 1)
            self.heal(source, target)
            link.num_delays, link.delay_s = 0, 0.0

    def shrink_buffers(self, host: str) -> None:
        """Senders of a host soon wait for their receivers."""
        self.kernel.log("small buffers on %s", host)
        self._full_hosts.add(host)
        self._resize_buffers(host)

    def restore_buffers(self, host: str) -> None:
        """As large as usual."""
        self._full_hosts.discard(host)
        self._resize_buffers(host)

    def restore_all_buffers(self) -> None:
        for host in sorted(self._full_hosts):
            self.restore_buffers(host)

    def buffer_bytes(self, host: str) -> int:
        return _FEW_BYTES if host in self._full_hosts else BUFFER_BYTES

    def window(self, host: str) -> int:
        return _FEW_MESSAGES if host in self._full_hosts else WINDOW

    def _resize_buffers(self, host: str) -> None:
        for sock in list(self.connections):
            if sock.host == host:
                sock.resize(self.buffer_bytes(host))
        for call in self.calls:
            for half in (call, call.other):
                if half is not None and half.process.host == host:
                    half.resize(self.window(host))

    def forget(self, host: str, other: str) -> None:
        """A host treats its connections to another host as reset; the other host is not told."""
        self.kernel.log("%s forgets %s", host, other)
        for sock in list(self.connections):
            if sock.peer is not None and (sock.host, sock.peer.host) == (host, other):
                sock.forget()
        for call in list(self.calls):
            for half in (call, call.other):
                if half is not None and (half.process.host, half.pipe.target) == (host, other):
                    half.forget()

    def reset(self, host: str, other: str) -> None:
        """Break all connections between two hosts, as a firewall that forgets them does."""
        self.kernel.log("reset %s - %s", host, other)
        for sock in list(self.connections):
            if sock.peer is not None and {sock.host, sock.peer.host} == {host, other}:
                sock.break_off()
        for call in list(self.calls):
            if call.other is not None and {call.process.host, call.pipe.target} == {host, other}:
                call.break_off()
                call.other.break_off()


def network() -> Network:
    """The network of the simulation that runs."""
    assert Network.current is not None
    return Network.current
