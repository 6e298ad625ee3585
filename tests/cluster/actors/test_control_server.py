"""The control server against callers that are not ours, and against lost workers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Awaitable, Callable

import pytest

from cluster.actors import control_server
from cluster.actors.control_server import MAX_UNPROVED, ControlServer
from cluster.core.control_codec import MAX_FRAME_BYTES, decode, encode
from cluster.core.errors import ProtocolError
from cluster.core.frames import (
    ControlChallenge,
    ControlFrame,
    ControlHello,
    ControlProof,
    Heartbeat,
    HeartbeatAck,
    WorkerReady,
)
from cluster.core.proof import TokenProof
from cluster.core.release import RELEASE

TOKEN = "a token"
LIMIT_S = 60.0
BEAT = Heartbeat(progress=1, idle=True, generation=0)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Events:
    """Keeps the server's events."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[tuple[str, ControlFrame]] = asyncio.Queue()
        self.closed: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def on_frame(self, worker: str, frame: ControlFrame) -> None:
        if isinstance(frame, ControlProof):
            raise ProtocolError("out of place")
        if isinstance(frame, WorkerReady):
            raise KeyError("a mistake of ours")
        self.frames.put_nowait((worker, frame))

    def on_closed(self, worker: str, reason: str, is_invalid: bool) -> None:
        self.closed.put_nowait((worker, reason))


class Case:
    """A running server and its events."""

    def __init__(self, server: ControlServer, events: Events, address: str) -> None:
        self.server, self.events = server, events
        host, _, port = address.rpartition(":")
        self.host, self.port = host, int(port)

    async def connect(self) -> Streams:
        """A connection without handshake."""
        return await asyncio.open_connection(self.host, self.port)

    async def admit(
        self, name: str = "expert-0", token: str = TOKEN, release: str = RELEASE
    ) -> Streams:
        """A connection with handshake, as a worker makes it."""
        reader, writer = await self.connect()
        proof = TokenProof(token, "control", is_caller=True)
        writer.write(encode(ControlHello(worker=name, nonce=proof.nonce, release=release)))
        challenge = await _read(reader)
        assert isinstance(challenge, ControlChallenge)
        proof.their_nonce = challenge.nonce
        assert proof.is_peer_proof(challenge.proof) is (token == TOKEN)
        writer.write(encode(ControlProof(proof=proof.make_proof())))
        return reader, writer

    async def still_serves(self) -> None:
        """A worker can come and be heard."""
        _, writer = await self.admit("attention-7")
        writer.write(encode(BEAT))
        assert await asyncio.wait_for(self.events.frames.get(), LIMIT_S) == ("attention-7", BEAT)
        writer.close()
        await self.events.closed.get()


async def _read(reader: asyncio.StreamReader) -> ControlFrame:
    length = int.from_bytes(await reader.readexactly(4), "big")
    return decode(await reader.readexactly(length))


async def _ends(reader: asyncio.StreamReader) -> bool:
    """Whether the server closes the connection within the limit."""
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), LIMIT_S)
    return True


def _run(body: Callable[[Case], Awaitable[None]], handshake_limit_s: float = LIMIT_S) -> None:
    async def main() -> None:
        events = Events()
        server = ControlServer(TOKEN, events, handshake_limit_s=handshake_limit_s)
        case = Case(server, events, await server.start("127.0.0.1"))
        try:
            await asyncio.wait_for(body(case), 4 * LIMIT_S)
        finally:
            await server.close()

    asyncio.run(main())


def test_a_worker_is_heard_answered_and_missed() -> None:
    async def body(case: Case) -> None:
        reader, writer = await case.admit()
        writer.write(encode(BEAT))
        assert await case.events.frames.get() == ("expert-0", BEAT)
        assert case.server.is_connected("expert-0")
        case.server.send(HeartbeatAck(term=1), "expert-0")
        case.server.send(HeartbeatAck(term=1), "nobody")
        assert await _read(reader) == HeartbeatAck(term=1)
        writer.close()
        assert await case.events.closed.get() == ("expert-0", "closed by the peer")
        assert not case.server.is_connected("expert-0")

    _run(body)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00\x00\x00\x00",
        b"\xff" * 64,
        b"\x00\x00\x00\x01\x80",
        b"\x00\x00\x00\x02{}",
        b"\x00\x00\x00\x05",
        encode(ControlProof(proof="x")),
        encode(ControlHello(worker="../../x", nonce="ab")),
        encode(ControlHello(worker="x" * 65, nonce="ab")),
        encode(ControlHello(worker="expert-0", nonce="n" * 5000)),
        encode(BEAT),
        random.Random(3).randbytes(4096),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_rubbish_ends_only_its_connection(data: bytes) -> None:
    async def body(case: Case) -> None:
        _, worker = await case.admit()
        reader, writer = await case.connect()
        writer.write(data)
        if len(data) < 6:
            writer.write_eof()
        assert await _ends(reader)
        writer.close()
        worker.write(encode(BEAT))
        assert await case.events.frames.get() == ("expert-0", BEAT)
        assert case.events.closed.empty()
        worker.close()
        await case.events.closed.get()
        await case.still_serves()

    _run(body)


def test_a_wrong_token_is_cut_off() -> None:
    async def body(case: Case) -> None:
        reader, writer = await case.admit(token="another")
        writer.write(encode(BEAT))
        assert await _ends(reader)
        writer.close()
        assert case.events.frames.empty()
        assert case.events.closed.empty()
        await case.still_serves()

    _run(body)


@pytest.mark.parametrize("release", ["9.9.9", ""])
def test_a_worker_of_another_release_is_refused_by_name(
    release: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(case: Case) -> None:
        _, ours = await case.admit("attention-0")
        reader, writer = await case.admit(release=release)
        assert await _ends(reader)
        writer.close()
        ours.write(encode(BEAT))  # the cluster serves on
        assert await case.events.frames.get() == ("attention-0", BEAT)
        assert not case.server.is_connected("expert-0")
        assert case.events.closed.empty()
        ours.close()
        await case.events.closed.get()

    _run(body)
    theirs = f"release {release}" if release else "no release"
    expected = f"{theirs} of expert-0, {RELEASE} of the controller: releases must be equal"
    assert expected in caplog.text


def test_a_silent_caller_is_cut_off_in_time() -> None:
    async def body(case: Case) -> None:
        reader, writer = await case.connect()
        assert await _ends(reader)
        writer.close()
        await case.still_serves()

    _run(body, handshake_limit_s=0.5)


def test_many_silent_callers_do_not_keep_workers_out() -> None:
    async def body(case: Case) -> None:
        callers = [await case.connect() for _ in range(MAX_UNPROVED + 5)]
        await case.still_serves()
        assert await _ends(callers[0][0])
        for _, writer in callers:
            writer.close()

    _run(body)


@pytest.mark.parametrize("num_turns", [0, 1, 3, 4, 5])  # asyncio itself forgets a caller after 2
def test_a_caller_is_cut_off_whenever_the_server_closes(num_turns: int) -> None:
    """Accepting takes some turns of the event loop before the server has the connection."""

    async def body(case: Case) -> None:
        with socket.create_connection((case.host, case.port), LIMIT_S) as caller:
            for _ in range(num_turns):
                await asyncio.sleep(0)
            await case.server.close()
            with contextlib.suppress(ConnectionError):
                assert await asyncio.to_thread(caller.recv, 1) == b""

    _run(body, handshake_limit_s=4 * LIMIT_S)


def test_a_proved_worker_that_sends_rubbish_is_lost() -> None:
    async def body(case: Case) -> None:
        _, writer = await case.admit()
        writer.write(b"\x00\x00\x00\x03abc")
        worker, reason = await case.events.closed.get()
        assert worker == "expert-0"
        assert reason.startswith("not a control frame")
        writer.close()
        _, writer = await case.admit()
        writer.write((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
        assert "must be 1 to" in (await case.events.closed.get())[1]
        writer.close()
        _, writer = await case.admit()
        writer.write(encode(ControlProof(proof="again")))
        assert await case.events.closed.get() == ("expert-0", "out of place")
        writer.close()

    _run(body)


def test_a_mistake_of_the_controller_does_not_lose_the_sender() -> None:
    async def body(case: Case) -> None:
        _, writer = await case.admit()
        writer.write(encode(WorkerReady()) + encode(BEAT))
        assert await case.events.frames.get() == ("expert-0", BEAT)
        assert case.events.closed.empty()
        writer.close()

    _run(body)


def test_the_newer_connection_of_a_worker_wins() -> None:
    async def body(case: Case) -> None:
        old_reader, old_writer = await case.admit()
        old_writer.write(encode(BEAT))
        await case.events.frames.get()
        _, new_writer = await case.admit()
        assert await _ends(old_reader)
        old_writer.close()
        new_writer.write(encode(BEAT))
        assert await case.events.frames.get() == ("expert-0", BEAT)
        assert case.events.closed.empty()
        new_writer.close()
        await case.events.closed.get()

    _run(body)


def test_a_dropped_worker_gets_its_last_frames_and_no_event() -> None:
    async def body(case: Case) -> None:
        reader, writer = await case.admit()
        writer.write(encode(BEAT))
        await case.events.frames.get()
        case.server.send(HeartbeatAck(term=5), "expert-0")
        case.server.drop("expert-0")
        assert await _read(reader) == HeartbeatAck(term=5)
        assert await _ends(reader)
        writer.close()
        await asyncio.sleep(0.05)
        assert case.events.closed.empty()

    _run(body)


def test_a_frame_for_many_workers_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[ControlFrame] = []

    def counted(frame: ControlFrame) -> bytes:
        encoded.append(frame)
        return encode(frame)

    async def body(case: Case) -> None:
        callers = [await case.admit(name) for name in ("expert-0", "expert-1", "expert-2")]
        for _, writer in callers:
            writer.write(encode(BEAT))
            await case.events.frames.get()
        monkeypatch.setattr(control_server, "encode", counted)
        first, second = HeartbeatAck(term=1), HeartbeatAck(term=2)
        for frame in (first, second):
            case.server.send(frame, *(f"expert-{number}" for number in range(3)))
        for reader, writer in callers:
            assert [await _read(reader), await _read(reader)] == [first, second]
            writer.close()
        assert encoded == [first, second]

    _run(body)
