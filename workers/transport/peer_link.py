"""Bulk transfers between two workers, separate from the data plane, so that no step waits for them.

    client                                      server
    handshake (cluster token, checkpoint, configuration), then for each request:
    u16 count, the keys of items          ->
                                          <-    u16 count of available items from the first on,
                                                u64 size of each, then for each item a checksum of
                                                16 bytes and the data
    u16 count of the items that were kept ->        (always 0 with ``is_spare``)

An item is the data of a key, such as a KV block or an expert. All keys of a server have the same
length, and so have all items of a reply. The checksum covers key and data, so that a flipped bit or
a wrong item is detected. Both sides know the size of an item beforehand. Nothing is unpickled. A
server serves at most ``MAX_CONNECTIONS`` connections at a time, one thread each; one more closes
the oldest without proof of the cluster token, or is refused if all have proved it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from cluster.core.addresses import split_address, tune_socket
from cluster.core.errors import HandshakeError, PeerLostError, ProtocolError
from workers.transport.handshake import ConnectorHandshake, ListenerHandshake, PeerIdentity
from workers.transport.socket_io import receive_bytes, receive_exactly, time_left

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Maximum number of concurrent connections of a ``PeerServer``: all workers of a large cluster may
copy experts or sessions from a server while others fetch blocks for requests."""
COUNT: Final = struct.Struct("!H")
"""Wire format of the number of requested items and of the number of kept items."""
MAX_ITEMS: Final = 2**16 - 1
"""Maximum number of items in one request."""
REPLY: Final = struct.Struct("!HQ")
"""Wire format of the head of a reply: number of items, and size of each item in bytes."""
CHECKSUM_BYTES: Final = 16
CHUNK_BYTES: Final = 256 * 1024
"""Number of bytes that are sent or received at a time."""
_IDLE_S = 30.0
"""Longest time between two messages of a client, and longest time to send one chunk, in seconds."""
_HANDSHAKE_S = 10.0
"""Time limit in seconds for a client's handshake, and for a closing server's thread to end."""
_READ_BYTES = 4096


def checksum(key: bytes, parts: Sequence[memoryview]) -> bytes:
    """Return the 16-byte checksum of an item's key and data."""
    digest = hashlib.blake2b(key, digest_size=CHECKSUM_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def view_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, without a copy."""
    return tensor.view(torch.uint8).flatten().numpy().data


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerEndpoint:
    """Address of another worker's ``PeerServer``, and the credentials to connect to the server."""

    name: str
    address: str
    """Address of the server, ``host:port``."""
    me: PeerIdentity
    """Identity of the worker that connects."""
    token: str


class PeerClient:
    """A connection to another worker's ``PeerServer``, which fetches items by their keys.

    Not thread-safe; every wait has a time limit.

    After ``fetch`` has raised an exception, the connection is unusable.
    """

    def __init__(
        self,
        peer: PeerEndpoint,
        timeout_s: float,
        *,
        deadline_s: float | None = None,
        before_chunk: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """Connect and prove the cluster token.

        ``timeout_s`` limits the connect and every wait for bytes. All fetches must be done before
        ``deadline_s`` (``time.monotonic``). ``before_chunk`` is called with the size of each chunk
        before it is received, for example to limit the rate, and may raise.

        Raises ``PeerLostError`` if the peer cannot be reached, and ``HandshakeError`` if the peer
        belongs to another cluster.
        """
        self.peer = peer.name
        self._deadline_s = deadline_s
        self._before_chunk = before_chunk
        try:
            self._sock = socket.create_connection(split_address(peer.address), timeout_s)
        except (OSError, ValueError) as err:
            raise PeerLostError(peer.name, f"cannot connect to {peer.address}: {err}") from err
        try:
            tune_socket(self._sock)
            shake_hands(self._sock, ConnectorHandshake(peer.me, peer.token), timeout_s)
        except OSError as err:
            self._sock.close()
            raise self._lost(err) from err
        except ProtocolError:
            self._sock.close()
            raise
        self._sock.settimeout(timeout_s)

    def close(self) -> None:
        self._sock.close()

    def fetch(
        self,
        what: str,
        keys: Sequence[bytes],
        parts: Sequence[memoryview],
        keep: Callable[[int], None] = lambda place: None,
        *,
        is_spare: bool = False,
    ) -> int:
        """Receive the items of the longest prefix of ``keys`` that the peer has; return the count.

        Each item is received into ``parts``, which the next item overwrites, and checked; then
        ``keep`` is called with the item's index in ``keys``. ``what`` names the items in errors. If
        ``is_spare``, the items are only spare copies: the client reports to the peer that it kept
        none.

        Raises ``PeerLostError`` if the connection breaks or is too slow, and ``ProtocolError`` if
        an item is damaged or not the requested one; earlier items were kept.
        """
        try:
            self._sock.sendall(COUNT.pack(len(keys)) + b"".join(keys))
            count = self._receive_head(what, len(keys), sum(map(len, parts)))
            for place, key in enumerate(keys[:count]):
                self._receive_item(what, key, parts)
                keep(place)
            self._sock.sendall(COUNT.pack(0 if is_spare else count))
        except OSError as err:
            raise self._lost(err) from err
        return count

    def _receive_head(self, what: str, max_items: int, size: int) -> int:
        head = receive_bytes(self._sock, REPLY.size, self._deadline_s)
        count, length = REPLY.unpack(head)
        if count > max_items or (count and length != size):
            raise ProtocolError(
                f"{what} from {self.peer}: {count} items of {length} bytes are announced, must be "
                f"at most {max_items} of {size}"
            )
        return int(count)

    def _receive_item(self, what: str, key: bytes, parts: Sequence[memoryview]) -> None:
        expected = receive_bytes(self._sock, CHECKSUM_BYTES, self._deadline_s)
        for chunk in _chunks(parts):
            self._before_chunk(len(chunk))
            receive_exactly(self._sock, chunk, self._deadline_s)
        if checksum(key, parts) != expected:
            raise ProtocolError(f"{what} from {self.peer} is damaged: its checksum differs")

    def _lost(self, err: OSError) -> PeerLostError:
        return PeerLostError(self.peer, str(err) or type(err).__name__)


Item = TypeVar("Item")


class ItemProvider(Protocol[Item]):
    """Provides KV blocks or experts to a ``PeerServer``. Thread-safe."""

    def acquire(self, keys: Sequence[bytes]) -> list[Item]:
        """Acquire the items of the longest available prefix of ``keys``, and return these items.

        The items do not change until ``release``.
        """

    def read(self, item: Item) -> Sequence[Tensor]:
        """Return the data of an acquired item as contiguous CPU tensors."""

    def release(self, items: list[Item], num_kept: int) -> None:
        """Release acquired items. The client keeps copies of the first ``num_kept`` items."""


class PeerServer:
    """Server from which other workers fetch items (KV blocks or experts), on a free port.

    The port listens from the creation on; ``start`` begins to serve.
    """

    def __init__(
        self, me: PeerIdentity, token: str, *, host: str, what: str, key_bytes: int
    ) -> None:
        """``what``: name of the items for threads and log lines. ``key_bytes``: size of a key."""
        self._me = me
        self._token = token
        self._what = what
        self._key_bytes = key_bytes
        self._provider: ItemProvider[Any] | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._unproven: dict[socket.socket, str] = {}
        """Callers by socket in ``_open`` that have not proved the cluster token, oldest first."""
        self._listener = socket.create_server((host, 0), backlog=MAX_CONNECTIONS)
        self.address = "{}:{}".format(*self._listener.getsockname()[:2])
        """``host:port`` at which the server listens."""
        self._thread = threading.Thread(target=self._accept, name=f"{what}-server", daemon=True)

    def start(self, provider: ItemProvider[Any]) -> None:
        """Start to accept connections and to serve the items of ``provider``."""
        self._provider = provider
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(_HANDSHAKE_S)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                self._closing.wait(0.05)  # closed, or no file descriptors: do not spin
                continue
            caller = f"{address[0]}:{address[1]}"
            if not self._take_slot(sock, caller):
                self._refuse(caller, "too many connections")
                sock.close()
                continue
            sender = threading.Thread(
                target=self._serve, args=(sock, caller), name=f"{self._what}-sender", daemon=True
            )
            try:
                sender.start()
            except RuntimeError as err:  # the process has reached its limit of threads
                self._refuse(caller, str(err))
                self._free_slot(sock)
                sock.close()

    def _take_slot(self, sock: socket.socket, caller: str) -> bool:
        """Count a connection; False if all others have proved the token and no more is allowed."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._unproven), None)
                if oldest is None:
                    return False
                name = self._unproven.pop(oldest)
                self._refuse(name, "too many connections without a token")
                self._open.discard(oldest)
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
            self._open.add(sock)
            self._unproven[sock] = caller
        return True

    def _keep_slot(self, sock: socket.socket) -> None:
        """Note that the caller has proved the token, before the reply that tells it so."""
        with self._lock:
            self._unproven.pop(sock, None)

    def _free_slot(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)
            self._unproven.pop(sock, None)

    def _serve(self, sock: socket.socket, caller: str) -> None:
        with sock:
            try:
                tune_socket(sock)
                handshake = ListenerHandshake(
                    self._me, self._token, lambda peer: self._keep_slot(sock)
                )
                shake_hands(sock, handshake, _HANDSHAKE_S)
                if handshake.refusal is not None:
                    raise HandshakeError(handshake.refusal)
                sock.settimeout(_IDLE_S)
                while not self._closing.is_set():
                    self._serve_request(sock)
            except ProtocolError as err:
                self._refuse(caller, str(err))
            except OSError as err:
                logger.debug("%s for %s: %s", self._what, caller, err)
            finally:
                self._free_slot(sock)

    def _serve_request(self, sock: socket.socket) -> None:
        """Wait for a client's next request and serve it.

        Raises ``OSError`` if the connection has ended.
        """
        assert self._provider is not None, "start was not called"
        keys = self._read_keys(sock)
        items, num_kept = self._provider.acquire(keys), 0
        try:
            if not items:
                sock.sendall(REPLY.pack(0, 0))
            for place, item in enumerate(items):
                parts = [view_bytes(tensor) for tensor in self._provider.read(item)]
                if not place:
                    sock.sendall(REPLY.pack(len(items), sum(map(len, parts))))
                sock.sendall(checksum(keys[place], parts))
                for chunk in _chunks(parts):
                    sock.sendall(chunk)
            num_kept = min(_receive_count(sock), len(items))
        finally:
            self._provider.release(items, num_kept)

    def _read_keys(self, sock: socket.socket) -> list[bytes]:
        size = self._key_bytes
        joined = receive_bytes(sock, _receive_count(sock) * size)
        return [bytes(joined[i : i + size]) for i in range(0, len(joined), size)]

    def _refuse(self, caller: str, reason: str) -> None:
        logger.warning("%s: %s refused to %s: %s", self._me.name, self._what, caller, reason)


def shake_hands(
    sock: socket.socket, handshake: ConnectorHandshake | ListenerHandshake, timeout_s: float
) -> None:
    """Run a handshake with another worker on a blocking socket, to the end.

    Raises ``HandshakeError`` if the peer belongs to another cluster, and ``OSError`` if the
    connection breaks or is too slow.
    """
    deadline = time.monotonic() + timeout_s
    if isinstance(handshake, ConnectorHandshake):
        sock.sendall(handshake.start())
    while not handshake.done:
        sock.settimeout(time_left(deadline))
        data = sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionError("closed the connection during the handshake")
        answer = handshake.feed(data)
        if answer:
            sock.sendall(answer)


def _receive_count(sock: socket.socket) -> int:
    return int(COUNT.unpack(receive_bytes(sock, COUNT.size))[0])


def _chunks(parts: Sequence[memoryview]) -> Iterator[memoryview]:
    for part in parts:
        for first in range(0, len(part), CHUNK_BYTES):
            yield part[first : first + CHUNK_BYTES]
