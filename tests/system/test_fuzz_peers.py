"""Spoilt frames of peers that know the token: the edge or connection ends, and nothing else."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.harness.members import member_of
from benchmarks.harness.mesh import make_connections
from cluster.actors.control_server import ControlServer
from cluster.core.control_codec import encode
from cluster.core.errors import PeerLostError
from cluster.core.frames import (
    ControlFrame,
    Heartbeat,
    LoadProgress,
    PeerLost,
    Register,
    StatusReply,
)
from tests.cluster.actors.test_control_server import TOKEN, Case, Events
from tests.long.fuzz_inputs import Mutator
from tests.workers.transport.test_peer_connections import LIMIT_S, exchange, form, until
from workers.transport.frames import FrameHeader, FrameKind

NUM_FRAMES = 120


def test_spoilt_frames_of_a_worker_end_its_edge_at_most() -> None:
    mutator = Mutator("data plane")
    home, expert = make_connections("attention", 0), make_connections("expert", 0)
    try:
        with ThreadPoolExecutor(2) as pool:
            for number in range(1, NUM_FRAMES + 1):
                form(pool, number, home, expert)
                expert.begin_step(1)
                generation = mutator.random.choice((number, number - 1, number + 1, 2**31))
                kind = mutator.random.choice(tuple(FrameKind))
                frame = FrameHeader(kind, generation, mutator.random.randrange(3), length=8)
                sock = home.edges["expert-0"].sock
                sock.sendall(mutator.spoil(frame.encode() + b"8 bytes!") + b"tail")
                sock.shutdown(socket.SHUT_WR)  # whatever it was: the end comes
                for connections in (expert, home):
                    with pytest.raises(PeerLostError) as caught:
                        until(connections, lambda: False)
                    assert caught.value.peer in ("attention-0", "expert-0")
            form(pool, NUM_FRAMES + 1, home, expert)
            expert.begin_step(1)
            exchange(home, expert, 1, NUM_FRAMES + 1)
    finally:
        home.close()
        expert.close()


def good_frames() -> tuple[ControlFrame, ...]:
    return (
        Heartbeat(progress=3, idle=False, generation=2, stats={"kv_blocks_free": 1.0}),
        Register(member=member_of("expert-0"), info={"threads": 2}),
        LoadProgress(loaded_bytes=5, total_bytes=9),
        StatusReply(token=7, stats={"a": 1.0}),
        PeerLost(worker="expert-1", reason="reset", generation=4),
    )


def test_spoilt_control_frames_end_their_connection_at_most() -> None:
    mutator = Mutator("control")

    async def main() -> None:
        events = Events()
        server = ControlServer(TOKEN, events, handshake_limit_s=LIMIT_S)
        case = Case(server, events, await server.start("127.0.0.1"))
        try:
            for _ in range(NUM_FRAMES):
                _, writer = await case.admit()
                frame = mutator.random.choice(good_frames())
                writer.write(mutator.spoil(encode(frame)))
                writer.write_eof()
                worker, _ = await asyncio.wait_for(events.closed.get(), LIMIT_S)
                assert worker == "expert-0"
                writer.close()
            while not events.frames.empty():  # those that were still frames
                events.frames.get_nowait()
            await case.still_serves()
        finally:
            await server.close()

    asyncio.run(main())
