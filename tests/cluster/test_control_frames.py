"""Control messages on the wire."""

from __future__ import annotations

import json
import random
import struct

import pytest

from cluster.control_frames import (
    FRAMES,
    ControlChallenge,
    ControlFrame,
    ControlHello,
    ControlProof,
    DrainWish,
    EpochReady,
    EpochSwitched,
    ExpertsLoaded,
    GenerationReady,
    Heartbeat,
    HeartbeatAck,
    Keepsake,
    LoadExperts,
    LoadProgress,
    NewEpoch,
    NewGeneration,
    PeerLost,
    Register,
    Rejoin,
    RunGeneration,
    Shutdown,
    StatusReply,
    StatusRequest,
    SwitchEpoch,
    WorkerFailed,
    WorkerReady,
    decode,
    encode,
    frame_length,
    proof,
)
from cluster.errors import ProtocolError

SAMPLES: tuple[ControlFrame, ...] = (
    ControlHello(worker="expert-0", nonce="ab"),
    ControlChallenge(nonce="cd", proof="ef"),
    ControlProof(proof="01"),
    Register(member={"name": "expert-0"}, info={"threads": 2}),
    LoadProgress(loaded_bytes=3, total_bytes=10),
    WorkerReady(info={"vocab_size": 50}),
    WorkerFailed(reason="tensor x: shapes differ, \u00e4"),
    Heartbeat(
        progress=7,
        idle=False,
        waiting=True,
        fenced=True,
        number=4,
        generation=2,
        stats={"kv_blocks_free": 3.0},
        expert_load={"mlp:0": [1, 2]},
    ),
    HeartbeatAck(term=1, controller="a1", number=4),
    StatusRequest(token=5),
    StatusReply(token=5, stats={"x": 0.5}, expert_load={"mlp:0": [3]}),
    PeerLost(worker="expert-1", generation=2, reason="reset"),
    NewGeneration(term=1, generation={"number": 2, "members": []}, placement={"epoch": 3}),
    Keepsake(term=1, memory={"history": []}),
    Rejoin(
        term=1,
        generation={"number": 2},
        placement={"epoch": 3},
        running=True,
        highest_step=9,
        highest_epoch=3,
        memory={"history": []},
    ),
    GenerationReady(generation=2, highest_step=9, highest_epoch=3),
    NewEpoch(generation=2, epoch=4, base_epoch=3, banks=[[0, {"bank": "mlp"}]]),
    EpochReady(generation=2, epoch=4, error="no maps"),
    SwitchEpoch(generation=2, epoch=4, oldest_epoch=4),
    EpochSwitched(generation=2, epoch=4, step=17),
    RunGeneration(generation=2, first_step=10),
    LoadExperts(order=3, experts=[[0, 8, 5], [1, 8, -1]], source={"kind": "checkpoint"}),
    ExpertsLoaded(order=3, error="model.safetensors: no such file", num_bytes=7),
    DrainWish(),
    Shutdown(reason="stopped"),
)


def test_there_is_a_sample_of_every_frame() -> None:
    assert {type(s) for s in SAMPLES} == set(FRAMES.values())


@pytest.mark.parametrize("frame", SAMPLES, ids=lambda f: type(f).__name__)
def test_a_frame_survives_the_wire(frame: ControlFrame) -> None:
    data = encode(frame)
    assert frame_length(data[:4]) == len(data) - 4
    assert decode(data[4:]) == frame


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"null",
        b'"Heartbeat"',
        b"{}",
        b'{"kind":"Nothing"}',
        b'{"kind":["Heartbeat"]}',
        b'{"kind":"StatusRequest"}',
        b'{"kind":"StatusRequest","token":"5"}',
        b'{"kind":"StatusRequest","token":true}',
        b'{"kind":"StatusRequest","token":1.5}',
        b'{"kind":"StatusRequest","token":5,"more":1}',
        b'{"kind":"Register","member":[]}',
        b"[" * 100_000,
    ],
)
def test_rubbish_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(body)


def test_random_bytes_never_raise_anything_else() -> None:
    draw = random.Random(1)
    good = json.dumps({"kind": "Heartbeat", "progress": 1, "idle": True, "generation": 1}).encode()
    for _ in range(500):
        data = bytearray(good)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            decode(bytes(data))
        except ProtocolError:
            continue


@pytest.mark.parametrize("length", [0, 1025, 2**32 - 1])
def test_a_length_out_of_bounds_is_a_protocol_error(length: int) -> None:
    with pytest.raises(ProtocolError, match="must be 1 to 1024"):
        frame_length(struct.pack(">I", length), 1024)


def test_the_two_sides_prove_different_things() -> None:
    assert proof("t", "worker", "a", "b") != proof("t", "controller", "a", "b")
    assert proof("t", "worker", "a", "b") != proof("u", "worker", "a", "b")
    assert proof("t", "worker", "a", "b") != proof("t", "worker", "b", "a")
