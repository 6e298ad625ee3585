"""Experts out of another worker's memory: real sockets, real slots."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.engine_stream import TOKEN
from cluster.core.errors import HandshakeError, PeerLostError, ProtocolError, TransferAbortedError
from workers.experts.slots import ExpertSlots
from workers.experts.sources import CheckpointSource
from workers.experts.transfer.peer_source import (
    KEY,
    ExpertProvider,
    PeerSource,
)
from workers.experts.transfer.rate_limit import RateLimit
from workers.model.config import BankSpec
from workers.model.loading.checkpoint import Checkpoint
from workers.quantization.matrix import plain
from workers.transport.handshake import ListenerHandshake, PeerIdentity
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

CPU = torch.device("cpu")
TIMEOUT_S = 120.0


def identity(name: str, checkpoint: str = "abc") -> PeerIdentity:
    return PeerIdentity(
        name=name, role="expert", rank=0, checkpoint_id=checkpoint, config_hash="cfg"
    )


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint(tiny_checkpoint)


@pytest.fixture
def slots(checkpoint: Checkpoint) -> ExpertSlots:
    """All experts of the tiny model."""
    made = ExpertSlots(checkpoint.family.banks, 8, torch.float32, CPU)
    made.load_all(checkpoint)
    return made


@pytest.fixture
def server(slots: ExpertSlots) -> Iterator[PeerServer]:
    me = identity("expert-0")
    made = PeerServer(me, TOKEN, host="127.0.0.1", what="weights", key_bytes=KEY.size)
    made.start(ExpertProvider(slots))
    with closing(made):
        yield made


def connect(
    address: str,
    *,
    me: PeerIdentity | None = None,
    token: str = TOKEN,
    rate: RateLimit | None = None,
) -> PeerSource:
    peer = PeerEndpoint(
        name="expert-0", address=address, me=me or identity("expert-1"), token=token
    )
    rate = rate or RateLimit()
    return PeerSource(partial(PeerClient, peer, TIMEOUT_S, before_chunk=rate.take), RateLimit())


def fetch(source: PeerSource, bank: BankSpec, expert: int) -> list[Tensor]:
    return [plain(matrix.weight) for matrix in source.weights(bank, expert, torch.float32)]


def test_experts_arrive_bit_for_bit(
    server: PeerServer, slots: ExpertSlots, checkpoint: Checkpoint
) -> None:
    banks = checkpoint.family.banks
    with closing(connect(server.address)) as client:
        for bank in banks:
            for expert in range(bank.num_experts):
                matrices = fetch(client, bank, expert)
                expected = slots.read_expert(bank.index, expert)
                assert expected is not None
                assert all(
                    torch.equal(a, plain(b)) for a, b in zip(matrices, expected, strict=True)
                )
    total = sum(8 * b.num_bytes(4) for b in banks)
    assert client.num_bytes == total


def test_a_source_hands_out_what_arrived(
    server: PeerServer, slots: ExpertSlots, checkpoint: Checkpoint
) -> None:
    received = ExpertSlots(checkpoint.family.banks, 8, torch.float32, CPU)
    source = connect(server.address)
    with closing(source):
        for expert in range(8):
            for _ in received.load_expert(1, 7 - expert, expert, source):
                assert 7 - expert not in received.contents(1)
    assert received.contents(1) == {7 - e: e for e in range(8)}
    assert source.num_bytes == 8 * checkpoint.family.banks[1].num_bytes(4)
    for expert in range(8):
        found, expected = received.read_expert(1, expert), slots.read_expert(1, expert)
        assert found is not None
        assert expected is not None
        assert all(torch.equal(plain(a), plain(b)) for a, b in zip(found, expected, strict=True))


def test_an_expert_whose_slot_is_given_back_meanwhile_is_not_held(slots: ExpertSlots) -> None:
    """The loader shrinks the bank between the look at its contents and the copy."""
    contents = slots._contents[0]

    class GivenBack(dict[int, Any]):
        def copy(self) -> dict[int, Any]:
            found = super().copy()
            slots._contents[0] = contents
            slots.keep_only([() for _ in slots.banks], 0)
            return found

    slots._contents[0] = GivenBack(contents)
    assert slots.read_expert(0, 6) is None
    assert slots.contents(0) == {}


def test_what_is_not_held_is_refused_and_the_connection_goes_on(
    server: PeerServer, slots: ExpertSlots, checkpoint: Checkpoint
) -> None:
    bank = checkpoint.family.banks[0]
    kept = slots.read_expert(0, 6)
    assert kept is not None
    slots.clear(0, 5)
    with closing(connect(server.address)) as client:
        for wrong in (replace(bank, index=9), bank):
            with pytest.raises(ProtocolError, match="expert-0 does not hold expert 5"):
                fetch(client, wrong, 5)
        assert torch.equal(fetch(client, bank, 6)[0], plain(kept[0]))


@pytest.mark.parametrize(
    ("me", "token", "message"),
    [
        (identity("expert-1"), "another token", "expert-0"),
        (identity("expert-1", "other checkpoint"), TOKEN, "checkpoint"),
    ],
    ids=["token", "checkpoint"],
)
def test_strangers_get_nothing(
    server: PeerServer, checkpoint: Checkpoint, me: PeerIdentity, token: str, message: str
) -> None:
    bank = checkpoint.family.banks[0]
    with (
        closing(connect(server.address, me=me, token=token)) as stranger,
        pytest.raises((HandshakeError, PeerLostError), match=message),
    ):
        fetch(stranger, bank, 0)
    assert stranger.num_bytes == 0
    with closing(connect(server.address)) as client:
        assert fetch(client, bank, 0)


def test_rubbish_ends_one_connection_only(
    server: PeerServer, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), TIMEOUT_S) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sock.recv(100) == b""
    with closing(connect(server.address)) as client:
        assert fetch(client, checkpoint.family.banks[0], 0)
    assert sum(" refused to " in message for message in caplog.messages) == 1


class LyingServer:
    """Passes the handshake, then answers every question as the test says."""

    def __init__(self, answer: Callable[[socket.socket, int, int], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with sock, contextlib.suppress(ConnectionError):  # the client may have heard enough
            handshake = ListenerHandshake(identity("expert-0"), TOKEN, lambda peer: None)
            shake_hands(sock, handshake, TIMEOUT_S)
            sock.settimeout(TIMEOUT_S)
            question = bytearray(COUNT.size + KEY.size)
            receive_exactly(sock, memoryview(question))
            self._answer(sock, *KEY.unpack(question[COUNT.size :]))

    def close(self) -> None:
        self._listener.close()
        self._thread.join(TIMEOUT_S)


def lies(slots: ExpertSlots, kind: str) -> Callable[[socket.socket, int, int], None]:
    def answer(sock: socket.socket, bank: int, expert: int) -> None:
        matrices = slots.read_expert(bank, expert)
        assert matrices is not None
        parts = [view_bytes(plain(m)) for m in matrices]
        length = sum(len(p) for p in parts)
        digest = checksum(KEY.pack(bank, expert), parts)
        if kind == "flipped bit":
            parts[1][7] ^= 1
        elif kind == "another expert":
            other = slots.read_expert(bank, expert + 1)
            assert other is not None
            parts = [view_bytes(plain(m)) for m in other]
            digest = checksum(KEY.pack(bank, expert + 1), parts)
        elif kind == "too long":
            length += 4
        elif kind == "huge":
            length = 1 << 60
        sock.sendall(REPLY.pack(1, length) + digest)
        for part in parts[:1] if kind == "half" else parts:
            sock.sendall(part)

    return answer


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flipped bit", "expert 2 of bank mlp layer 0 from expert-0 is damaged"),
        ("another expert", "is damaged"),
        ("too long", "at most 1 of 6144"),
        ("huge", "at most 1 of 6144"),
        ("half", "closed the connection"),
    ],
)
def test_what_is_damaged_is_not_taken(
    slots: ExpertSlots, checkpoint: Checkpoint, kind: str, message: str
) -> None:
    liar = LyingServer(lies(slots, kind))
    with (
        closing(liar),
        closing(connect(liar.address)) as client,
        pytest.raises((ProtocolError, PeerLostError), match=message),
    ):
        fetch(client, checkpoint.family.banks[0], 2)


def test_a_move_that_is_given_up_ends_within_a_chunk(
    server: PeerServer, checkpoint: Checkpoint
) -> None:
    cancelled = threading.Event()
    slow = RateLimit(1.0, cancelled=cancelled)  # an expert takes more than an hour
    with closing(connect(server.address, rate=slow)) as client:
        timer = threading.Timer(0.1, cancelled.set)
        timer.start()
        with pytest.raises(TransferAbortedError, match="it was cancelled"):
            fetch(client, checkpoint.family.banks[0], 0)
        timer.join()
    late = RateLimit(1.0, limit_s=0.05)
    with (
        closing(connect(server.address, rate=late)) as client,
        pytest.raises(TransferAbortedError, match=r"not done within 0.05 s"),
    ):
        fetch(client, checkpoint.family.banks[0], 0)


def test_a_move_that_was_given_up_before_it_began_opens_no_connection(
    checkpoint: Checkpoint,
) -> None:
    given_up = threading.Event()
    given_up.set()

    def refuse() -> PeerClient:
        raise AssertionError("connected")

    source = PeerSource(refuse, RateLimit(limit_s=TIMEOUT_S, cancelled=given_up))
    with pytest.raises(TransferAbortedError):
        next(source.weights(checkpoint.family.banks[0], 1, torch.float32))


def test_a_server_that_closes_ends_its_connections(
    server: PeerServer, checkpoint: Checkpoint
) -> None:
    with closing(connect(server.address)) as client:
        assert fetch(client, checkpoint.family.banks[0], 0)
        server.close()
        with pytest.raises(PeerLostError):
            fetch(client, checkpoint.family.banks[0], 0)


def test_bytes_are_handed_out_at_the_rate() -> None:
    now = 100.0
    limit = RateLimit(1000.0, clock=lambda: now)
    assert limit.delay_s(500) == pytest.approx(0.5)
    assert limit.delay_s(500) == pytest.approx(1.0)
    now = 100.6
    assert limit.delay_s(100) == pytest.approx(0.5)
    now = 200.0  # time that passed unused is not saved up, but for a short burst
    assert limit.delay_s(1000) == pytest.approx(0.98)
    assert RateLimit().delay_s(1 << 40) == 0.0


def test_any_source_keeps_to_the_rate(checkpoint: Checkpoint) -> None:
    bank = checkpoint.family.banks[0]
    paced = CheckpointSource(checkpoint, RateLimit(1e12, limit_s=TIMEOUT_S).take)
    with closing(paced):
        assert len(list(paced.weights(bank, 1, torch.float32))) == 2
        assert paced.num_bytes == bank.num_bytes(4)
    given_up = CheckpointSource(checkpoint, RateLimit(1.0, limit_s=0.01).take)
    with closing(given_up), pytest.raises(TransferAbortedError):
        list(given_up.weights(bank, 1, torch.float32))
