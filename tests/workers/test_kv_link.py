"""KV blocks between two workers: real sockets, and peers that lie."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cluster.errors import HandshakeError, PeerLostError, ProtocolError, TransportError
from tests.engine_stream import TIMEOUT_S, TOKEN
from workers.dist.handshake import ListenerHandshake, PeerIdentity
from workers.dist.peer_link import connect, receive_exactly, shake_hands, view_bytes
from workers.kv_link import (
    ANSWER,
    COUNT,
    Asking,
    KvServer,
    block_buffer,
    checksum,
    fetch_blocks,
)
from workers.prefix_hash import HASH_BYTES, BlockHash

SHAPE = (3, 4, 16, 8)
KINDS = (torch.float32, torch.bfloat16, torch.float16)


def identity(name: str, checkpoint: str = "abc", numerics: str = "") -> PeerIdentity:
    return PeerIdentity(
        name=name,
        role="attention",
        rank=0,
        checkpoint_id=checkpoint,
        config_hash="cfg",
        numerics=numerics,
    )


def name(number: int) -> BlockHash:
    return number.to_bytes(HASH_BYTES, "big")


class Shelf:
    """A lender with blocks 0, 1, 2 .. under ``name`` of their numbers."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.blocks = list(blocks)
        self.returned: list[tuple[list[int], int]] = []
        self.is_returned = threading.Event()

    def borrow(self, hashes: Sequence[BlockHash]) -> list[int]:
        known = [name(i) for i in range(len(self.blocks))]
        found = []
        for block_hash in hashes:
            if block_hash not in known:
                break
            found.append(known.index(block_hash))
        return found

    def read(self, block: int) -> Tensor:
        return self.blocks[block]

    def give_back(self, blocks: list[int], num_kept: int) -> None:
        self.returned.append((blocks, num_kept))
        self.is_returned.set()


@pytest.fixture(params=KINDS, ids=str)
def shelf(request: pytest.FixtureRequest) -> Shelf:
    draw = torch.Generator().manual_seed(0)
    return Shelf([torch.randn(SHAPE, generator=draw).to(request.param) for _ in range(5)])


@pytest.fixture
def server(shelf: Shelf) -> Iterator[KvServer]:
    made = KvServer(identity("attention-0"), TOKEN, host="127.0.0.1")
    made.start(shelf)
    with closing(made):
        yield made


def asking(address: str, *, token: str = TOKEN, limit_s: float = TIMEOUT_S) -> Asking:
    return Asking(
        peer="attention-0",
        address=address,
        me=identity("attention-1"),
        token=token,
        deadline_s=time.monotonic() + limit_s,
    )


def fetch(
    ask: Asking, numbers: Sequence[int], dtype: torch.dtype = torch.float32
) -> dict[int, Tensor]:
    """What comes, by place."""
    kept: dict[int, Tensor] = {}

    def keep(place: int, data: Tensor) -> None:
        kept[place] = data.clone()

    count = fetch_blocks(ask, [name(i) for i in numbers], block_buffer(SHAPE, dtype), keep)
    assert count == len(kept)
    return kept


def test_blocks_arrive_bit_for_bit_and_go_back(server: KvServer, shelf: Shelf) -> None:
    dtype = shelf.blocks[0].dtype
    found = fetch(asking(server.address), (3, 1, 4, 9, 2), dtype)
    assert {p: t.tolist() for p, t in found.items()} == {
        p: shelf.blocks[b].tolist() for p, b in enumerate((3, 1, 4))
    }
    assert shelf.is_returned.wait(TIMEOUT_S)
    assert shelf.returned == [([3, 1, 4], 3)]
    assert server.num_sent_bytes == sum(shelf.blocks[b].nbytes for b in (3, 1, 4))


def test_what_nobody_has_is_no_error(server: KvServer, shelf: Shelf) -> None:
    assert fetch(asking(server.address), (9, 1), shelf.blocks[0].dtype) == {}


@pytest.mark.parametrize(
    ("me", "token", "message"),
    [
        (identity("attention-1"), "another token", "attention-0"),
        (identity("attention-1", "other checkpoint"), TOKEN, "checkpoint"),
        (identity("attention-1", numerics="other"), TOKEN, "numerics|arithmetic|comput"),
    ],
    ids=["token", "checkpoint", "numerics"],
)
def test_strangers_get_nothing(me: PeerIdentity, token: str, message: str) -> None:
    shelf = Shelf([torch.zeros(SHAPE)])
    with closing(KvServer(identity("attention-0"), TOKEN, host="127.0.0.1")) as server:
        server.start(shelf)
        ask = replace(asking(server.address, token=token), me=me)
        with pytest.raises((HandshakeError, PeerLostError), match=message):
            fetch(ask, (0,))
        assert server.num_sent_bytes == 0
        assert shelf.returned == []


def test_who_hangs_up_gives_the_blocks_back() -> None:
    shelf = Shelf([torch.zeros(SHAPE)])
    with closing(KvServer(identity("attention-0"), TOKEN, host="127.0.0.1")) as server:
        server.start(shelf)

        def keep(place: int, data: Tensor) -> None:
            raise ProtocolError("enough")

        with pytest.raises(ProtocolError, match="enough"):
            fetch_blocks(
                asking(server.address), [name(0)], block_buffer(SHAPE, torch.float32), keep
            )
        assert shelf.is_returned.wait(TIMEOUT_S)
        assert shelf.returned == [([0], 0)]


def wait_free(server: KvServer) -> None:
    """Until all connections are over."""
    deadline = time.monotonic() + TIMEOUT_S
    while server._open:
        assert time.monotonic() < deadline, "a connection is held"
        time.sleep(0.001)


def test_rubbish_ends_one_connection_only() -> None:
    draw = random.Random(0)
    shelf = Shelf([torch.zeros(SHAPE)])
    with closing(KvServer(identity("attention-0"), TOKEN, host="127.0.0.1")) as server:
        server.start(shelf)
        host, _, port = server.address.rpartition(":")
        for _ in range(5):
            with socket.create_connection((host, int(port)), TIMEOUT_S) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n" + draw.randbytes(draw.randrange(100)))
                wait_free(server)
        me = identity("attention-1")
        for _ in range(30):  # from one that knows the token
            with connect("attention-0", server.address, me, TOKEN, TIMEOUT_S) as sock:
                sock.sendall(draw.randbytes(draw.randrange(1, 200)))
            wait_free(server)
        assert fetch(asking(server.address), (0,)).keys() == {0}


class LyingServer:
    """Passes the handshake, takes a question, and answers as it is told to."""

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
            receive_exactly(sock, memoryview(bytearray(COUNT.size + 2 * HASH_BYTES)))
            self._answer(sock)
            self._is_over.wait(TIMEOUT_S)

    def close(self) -> None:
        self._is_over.set()
        self._listener.close()
        self._thread.join(TIMEOUT_S)


def _block(number: int, *, flips: bool = False, named: int | None = None) -> bytes:
    data = torch.full(SHAPE, float(number))
    digest = checksum(name(number if named is None else named), view_bytes(data))
    if flips:
        data[0, 0, 0, 0] += 1
    return digest + bytes(view_bytes(data))


SIZE = torch.zeros(SHAPE).nbytes
LIES: dict[str, tuple[bytes, str, int]] = {
    "too many": (ANSWER.pack(3, SIZE), "announces 3 KV blocks", 0),
    "too long": (ANSWER.pack(2, SIZE + 1), f"of {SIZE + 1} bytes", 0),
    "huge": (struct.pack("!HI", 1, 2**32 - 1), "announces 1", 0),
    "flipped": (ANSWER.pack(2, SIZE) + _block(0) + _block(1, flips=True), "is damaged", 1),
    "another one": (ANSWER.pack(2, SIZE) + _block(1, named=1), "is damaged", 0),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_and_what_was_right_before_is_kept(lie: str) -> None:
    answer, message, num_kept = LIES[lie]
    kept: list[int] = []
    server = LyingServer(lambda sock: sock.sendall(answer))
    with closing(server), pytest.raises(ProtocolError, match=message):
        fetch_blocks(
            asking(server.address),
            [name(0), name(1)],
            block_buffer(SHAPE, torch.float32),
            lambda place, data: kept.append(place),
        )
    assert kept == list(range(num_kept))


def test_a_peer_that_is_silent_or_breaks_off_is_given_up() -> None:
    begun = ANSWER.pack(2, SIZE) + _block(0)[:100]
    server = LyingServer(lambda sock: sock.sendall(begun))
    with closing(server), pytest.raises(TransportError, match="attention-0"):
        fetch(asking(server.address, limit_s=0.3), (0, 1))
    server = LyingServer(lambda sock: sock.shutdown(socket.SHUT_RDWR))
    with closing(server), pytest.raises(PeerLostError, match="attention-0"):
        fetch(asking(server.address), (0, 1))
    with pytest.raises(TransportError):  # nobody listens there any more
        fetch(asking(server.address, limit_s=1.0), (0, 1))
