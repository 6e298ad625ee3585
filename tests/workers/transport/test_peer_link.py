"""Bulk data between two workers: real sockets, and peers that lie."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.harness.engine_stream import TIMEOUT_S, TOKEN
from cluster.core.errors import HandshakeError, PeerLostError, ProtocolError, TransportError
from workers.transport import peer_link
from workers.transport.handshake import ConnectorHandshake, ListenerHandshake, PeerIdentity
from workers.transport.peer_link import (
    COUNT,
    REPLY,
    PeerClient,
    PeerEndpoint,
    PeerServer,
    checksum,
    shake_hands,
    view_bytes,
)
from workers.transport.socket_io import receive_exactly

SHAPE = (3, 4, 16, 8)
KEY_BYTES = 32
KINDS = (torch.float32, torch.bfloat16, torch.float16)


def identity(name: str, checkpoint: str = "abc") -> PeerIdentity:
    return PeerIdentity(
        name=name,
        role="attention",
        rank=0,
        checkpoint_id=checkpoint,
        config_hash="cfg",
    )


def name(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


class Shelf:
    """A lender with blocks 0, 1, 2 .. under ``name`` of their numbers."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.blocks = list(blocks)
        self.returned: list[tuple[list[int], int]] = []
        self.is_returned = threading.Event()

    def acquire(self, keys: Sequence[bytes]) -> list[int]:
        known = [name(i) for i in range(len(self.blocks))]
        found = []
        for key in keys:
            if key not in known:
                break
            found.append(known.index(key))
        return found

    def read(self, item: int) -> tuple[Tensor, Tensor]:
        """In two parts."""
        return self.blocks[item][:1], self.blocks[item][1:]

    def release(self, items: list[int], num_kept: int) -> None:
        self.returned.append((items, num_kept))
        self.is_returned.set()


@pytest.fixture(params=KINDS, ids=str)
def shelf(request: pytest.FixtureRequest) -> Shelf:
    draw = torch.Generator().manual_seed(0)
    return Shelf([torch.randn(SHAPE, generator=draw).to(request.param) for _ in range(5)])


def new_server() -> PeerServer:
    return PeerServer(
        identity("attention-0"), TOKEN, host="127.0.0.1", what="blocks", key_bytes=KEY_BYTES
    )


@pytest.fixture
def server(shelf: Shelf) -> Iterator[PeerServer]:
    made = new_server()
    made.start(shelf)
    with closing(made):
        yield made


def peer_at(address: str, *, token: str = TOKEN) -> PeerEndpoint:
    return PeerEndpoint(
        name="attention-0", address=address, me=identity("attention-1"), token=token
    )


def client_of(peer: PeerEndpoint, limit_s: float = TIMEOUT_S) -> PeerClient:
    return PeerClient(peer, limit_s, deadline_s=time.monotonic() + limit_s)


def fetch(
    peer: PeerEndpoint,
    numbers: Sequence[int],
    dtype: torch.dtype = torch.float32,
    limit_s: float = TIMEOUT_S,
) -> dict[int, Tensor]:
    """What comes, by place."""
    kept: dict[int, Tensor] = {}
    buffer = torch.empty(SHAPE, dtype=dtype)

    def keep(place: int) -> None:
        kept[place] = buffer.clone()

    with closing(client_of(peer, limit_s)) as client:
        keys = [name(i) for i in numbers]
        assert client.fetch("a block", keys, [view_bytes(buffer)], keep) == len(kept)
    return kept


def test_no_message_waits_for_the_acknowledgement_of_another(server: PeerServer) -> None:
    """A question after small messages waited 40 ms for it, and an answer as long again."""
    with closing(client_of(peer_at(server.address))) as client:
        buffer = torch.empty(SHAPE)
        client.fetch("a block", [name(9)], [view_bytes(buffer)])
        ends = [client._sock, *server._open]
        options = [end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for end in ends]
    assert len(options) == 2
    assert all(options)


def test_blocks_arrive_bit_for_bit_and_go_back(server: PeerServer, shelf: Shelf) -> None:
    dtype = shelf.blocks[0].dtype
    found = fetch(peer_at(server.address), (3, 1, 4, 9, 2), dtype)
    assert {p: t.tolist() for p, t in found.items()} == {
        p: shelf.blocks[b].tolist() for p, b in enumerate((3, 1, 4))
    }
    assert shelf.is_returned.wait(TIMEOUT_S)
    assert shelf.returned == [([3, 1, 4], 3)]


def test_spare_copies_are_none_for_the_peer(server: PeerServer, shelf: Shelf) -> None:
    buffer = torch.empty(SHAPE, dtype=shelf.blocks[0].dtype)
    with closing(client_of(peer_at(server.address))) as client:
        found = client.fetch("a block", [name(3), name(1)], [view_bytes(buffer)], is_spare=True)
    assert found == 2
    assert buffer.tolist() == shelf.blocks[1].tolist()
    assert shelf.is_returned.wait(TIMEOUT_S)
    assert shelf.returned == [([3, 1], 0)]


def test_a_missing_item_is_no_error(server: PeerServer, shelf: Shelf) -> None:
    assert fetch(peer_at(server.address), (9, 1), shelf.blocks[0].dtype) == {}


@pytest.mark.parametrize(
    ("me", "token", "message"),
    [
        (identity("attention-1"), "another token", "attention-0"),
        (identity("attention-1", "other checkpoint"), TOKEN, "checkpoint"),
    ],
    ids=["token", "checkpoint"],
)
def test_strangers_get_nothing(me: PeerIdentity, token: str, message: str) -> None:
    shelf = Shelf([torch.zeros(SHAPE)])
    with closing(new_server()) as server:
        server.start(shelf)
        peer = replace(peer_at(server.address, token=token), me=me)
        with pytest.raises((HandshakeError, PeerLostError), match=message):
            fetch(peer, (0,))
        assert shelf.returned == []


def test_a_peer_that_hangs_up_gives_the_blocks_back() -> None:
    shelf = Shelf([torch.zeros(SHAPE)])
    with closing(new_server()) as server:
        server.start(shelf)

        def keep(place: int) -> None:
            raise ProtocolError("enough")

        with (
            closing(client_of(peer_at(server.address))) as client,
            pytest.raises(ProtocolError, match="enough"),
        ):
            client.fetch("a block", [name(0)], [view_bytes(torch.empty(SHAPE))], keep)
        assert shelf.is_returned.wait(TIMEOUT_S)
        assert shelf.returned == [([0], 0)]


def send_rubbish(sock: socket.socket, rubbish: bytes) -> None:
    """Send it, and wait until the server ends the connection."""
    sock.settimeout(TIMEOUT_S)
    with suppress(ConnectionError):
        sock.sendall(rubbish)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass


def test_rubbish_ends_one_connection_only() -> None:
    draw = random.Random(0)
    shelf = Shelf([torch.zeros(SHAPE)])
    with closing(new_server()) as server:
        server.start(shelf)
        host, _, port = server.address.rpartition(":")
        for _ in range(5):
            with socket.create_connection((host, int(port)), TIMEOUT_S) as sock:
                request = b"GET / HTTP/1.1\r\n\r\n"
                send_rubbish(sock, request + draw.randbytes(draw.randrange(100)))
        for _ in range(30):  # from one that knows the token
            with socket.create_connection((host, int(port)), TIMEOUT_S) as sock:
                me = identity("attention-1")
                shake_hands(sock, ConnectorHandshake(me, TOKEN), TIMEOUT_S)
                send_rubbish(sock, draw.randbytes(draw.randrange(1, 200)))
        assert fetch(peer_at(server.address), (0,)).keys() == {0}


class LyingServer:
    """Passes the handshake, takes a question, and answers as the test says."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with sock:
            handshake = ListenerHandshake(identity("attention-0"), TOKEN, lambda peer: None)
            shake_hands(sock, handshake, TIMEOUT_S)
            sock.settimeout(TIMEOUT_S)
            receive_exactly(sock, memoryview(bytearray(COUNT.size + 2 * KEY_BYTES)))
            self._answer(sock)
            self._is_over.wait(TIMEOUT_S)

    def close(self) -> None:
        self._is_over.set()
        self._listener.close()
        self._thread.join(TIMEOUT_S)


def _block(number: int, *, flips: bool = False, named: int | None = None) -> bytes:
    data = torch.full(SHAPE, float(number))
    digest = checksum(name(number if named is None else named), [view_bytes(data)])
    if flips:
        data[0, 0, 0, 0] += 1
    return digest + bytes(view_bytes(data))


SIZE = torch.zeros(SHAPE).nbytes
LIES: dict[str, tuple[bytes, str, int]] = {
    "too many": (REPLY.pack(3, SIZE), "3 items of", 0),
    "too long": (REPLY.pack(2, SIZE + 1), f"of {SIZE + 1} bytes", 0),
    "huge": (struct.pack("!HQ", 1, 2**64 - 1), "1 items of", 0),
    "flipped": (REPLY.pack(2, SIZE) + _block(0) + _block(1, flips=True), "is damaged", 1),
    "another one": (REPLY.pack(2, SIZE) + _block(1, named=1), "is damaged", 0),
}


def test_callers_without_a_token_keep_no_worker_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_link, "MAX_CONNECTIONS", 3)
    buffer = torch.empty(SHAPE)
    with closing(new_server()) as server, ExitStack() as callers:
        server.start(Shelf([torch.zeros(SHAPE)]))
        host, _, port = server.address.rpartition(":")
        peer = peer_at(server.address)
        clients = [callers.enter_context(closing(client_of(peer)))]
        silent = [socket.create_connection((host, int(port)), TIMEOUT_S) for _ in range(2)]
        for one in silent:
            callers.enter_context(one)
        for one in silent:  # the oldest one gives way
            clients.append(callers.enter_context(closing(client_of(peer))))
            assert one.recv(1) == b""
        with pytest.raises(PeerLostError):
            client_of(peer)
        for client in clients:
            assert client.fetch("a block", [name(0)], [view_bytes(buffer)]) == 1


def test_a_thread_that_cannot_start_ends_one_connection_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, errors = threading.Thread.start, [RuntimeError("can't start new thread")]

    def start_later(thread: threading.Thread) -> None:
        if thread.name == "blocks-sender" and errors:
            raise errors.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_later)
    with closing(new_server()) as server:
        server.start(Shelf([torch.zeros(SHAPE)]))
        with pytest.raises(PeerLostError):
            client_of(peer_at(server.address), 1.0)
        assert fetch(peer_at(server.address), (0,), limit_s=1.0).keys() == {0}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_and_what_was_right_before_is_kept(lie: str) -> None:
    answer, message, num_kept = LIES[lie]
    kept: list[int] = []
    keys = [name(0), name(1)]
    server = LyingServer(lambda sock: sock.sendall(answer))
    with (
        closing(server),
        closing(client_of(peer_at(server.address))) as client,
        pytest.raises(ProtocolError, match=message),
    ):
        client.fetch("a block", keys, [view_bytes(torch.empty(SHAPE))], kept.append)
    assert kept == list(range(num_kept))


def test_a_peer_that_is_silent_or_breaks_off_is_given_up() -> None:
    begun = REPLY.pack(2, SIZE) + _block(0)[:100]
    server = LyingServer(lambda sock: sock.sendall(begun))
    with closing(server), pytest.raises(TransportError, match="attention-0"):
        fetch(peer_at(server.address), (0, 1), limit_s=0.3)
    server = LyingServer(lambda sock: sock.shutdown(socket.SHUT_RDWR))
    with closing(server), pytest.raises(PeerLostError, match="attention-0"):
        fetch(peer_at(server.address), (0, 1))
    with pytest.raises(TransportError):  # no process listens there any more
        fetch(peer_at(server.address), (0, 1), limit_s=1.0)
