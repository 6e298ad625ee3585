"""Control messages on the wire."""

from __future__ import annotations

import random
import struct

import msgspec
import pytest

from benchmarks.harness.members import member_of
from cluster.core.control_codec import decode, decode_hello, encode, frame_length
from cluster.core.errors import ProtocolError
from cluster.core.frames import (
    AdapterRecord,
    AdaptersKept,
    Alive,
    ControlChallenge,
    ControlFrame,
    ControlHello,
    ControllerSnapshot,
    ControlProof,
    DrainRequest,
    EpochReady,
    EpochSwitched,
    ExpertsLoaded,
    GenerationReady,
    Heartbeat,
    HeartbeatAck,
    KeepAdapters,
    LoadExperts,
    LoadProgress,
    NewEpoch,
    NewGeneration,
    PeerLost,
    Register,
    RunGeneration,
    Shutdown,
    SnapshotKept,
    StatusReply,
    StatusRequest,
    Superseded,
    SwitchEpoch,
    WorkerFailed,
    WorkerReady,
    WorkerReport,
)
from cluster.core.placement import BankShape, contiguous
from cluster.core.release import Build
from cluster.core.topology import Generation
from tests.cluster.controller.load_reports import make_report

MEMBER = member_of("expert-0", pid=7)
GENERATION = Generation(number=2, members=(MEMBER, member_of("attention-0")))
PLACEMENT = contiguous([BankShape(bank="mlp", layer=0, num_experts=4)], 2, 1, epoch=3)
SAMPLES: tuple[ControlFrame, ...] = (
    ControlHello(worker="expert-0", nonce="ab", release="1.0"),
    ControlChallenge(nonce="cd", proof="ef", release="1.0"),
    ControlProof(proof="01"),
    Register(
        member=MEMBER,
        build=Build(checkpoint_id="c", config_hash="f"),
        info={"threads": 2},
    ),
    LoadProgress(loaded_bytes=3, total_bytes=10),
    WorkerReady(info={"vocab_size": 50}),
    WorkerFailed(reason="tensor x: shapes differ, \u00e4"),
    Heartbeat(
        progress=7,
        idle=False,
        running=True,
        epoch=3,
        waiting=True,
        fenced=True,
        number=4,
        generation=2,
        stats={"kv_blocks_free": 3.0},
        expert_load=make_report(3, [1, 2]),
        adapters=("sql@1",),
    ),
    Alive(),
    HeartbeatAck(term=1, controller="a1", number=4),
    StatusRequest(token=5),
    StatusReply(token=5, stats={"x": 0.5}, expert_load=make_report(3, [300])),
    PeerLost(worker="expert-1", generation=2, reason="reset"),
    NewGeneration(term=1, generation=GENERATION, placement=PLACEMENT),
    ControllerSnapshot(term=1, memory={"history": []}),
    SnapshotKept(version=7),
    WorkerReport(
        generation=GENERATION,
        placement=PLACEMENT,
        running=True,
        highest_step=9,
        highest_epoch=3,
        known_epoch=4,
        memory={"history": []},
        slots=((0, -1), (2, 3)),
    ),
    GenerationReady(generation=2, highest_step=9, highest_epoch=3, slots=((0, 1), ())),
    NewEpoch(generation=2, epoch=4, base_epoch=3, banks=((0, PLACEMENT.banks[0]),)),
    EpochReady(generation=2, epoch=4, error="no maps"),
    SwitchEpoch(generation=2, epoch=4, oldest_epoch=4),
    EpochSwitched(generation=2, epoch=4, step=17),
    RunGeneration(generation=2, first_step=10),
    LoadExperts(order=3, epoch=3, experts=[[0, 8, 5], [1, 8, -1]], source={"kind": "checkpoint"}),
    ExpertsLoaded(order=3, error="model.safetensors: no such file", num_bytes=7),
    KeepAdapters(
        number=4, adapters=(AdapterRecord(key="sql@1", name="sql", path="/a", digest="12ab"),)
    ),
    AdaptersKept(number=4, digests={"sql@1": "12ab"}, errors={"chat@2": "no such folder"}),
    DrainRequest(),
    Shutdown(reason="stopped"),
    Superseded(term=3),
)


def test_there_is_a_sample_of_every_frame() -> None:
    assert {type(s) for s in SAMPLES} == set(ControlFrame.__subclasses__())


@pytest.mark.parametrize("frame", SAMPLES, ids=lambda f: type(f).__name__)
def test_a_frame_survives_the_wire(frame: ControlFrame) -> None:
    data = encode(frame)
    assert frame_length(data[:4]) == len(data) - 4
    found = decode(data[4:])
    assert encode(found) == data
    if getattr(frame, "expert_load", None) is None:  # arrays have no equality of their own
        assert found == frame
    assert type(found) is type(frame)


def packed(**body: object) -> bytes:
    return msgspec.msgpack.encode(body)


def spoiled(frame: ControlFrame, path: tuple[str | int, ...], value: object) -> bytes:
    """The frame's bytes with another value at one place."""
    body = target = msgspec.msgpack.decode(encode(frame)[4:])
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return msgspec.msgpack.encode(body)


REPORT = WorkerReport(
    generation=GENERATION,
    placement=PLACEMENT,
    running=True,
    highest_step=1,
    highest_epoch=1,
)
MAPS = ("placement", "banks", 0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"\x90",
        b"\x07",
        b"\xc0",
        b"\xc1",
        b"\xa9Heartbeat",
        b'{"kind":"DrainRequest"}',
        packed(),
        packed(kind="Nothing"),
        packed(kind="ControlFrame"),
        packed(kind=["Heartbeat"]),
        packed(kind="StatusRequest"),
        packed(kind="StatusRequest", token="5"),
        packed(kind="StatusRequest", token=True),
        packed(kind="StatusRequest", token=1.5),
        packed(kind="StatusRequest", token=5, more=1),
        packed(kind="StatusRequest", token=5) + b"\x00",
        packed(kind="Register", member=[]),
        packed(kind="Register", member={}),
        packed(kind="Register", member={"name": "expert-0", "pid": 7}),
        packed(kind="DrainRequest")[:-1] + b"\xff",
        b"\x91" * 100_000,
        b"\x82\xa4kind\xabWorkerReady\xa4info" + b"\x81\xa1a" * 100_000,
        b"\x82\xa4kind\xabWorkerReady\xa4info\xdf\xff\xff\xff\xff",
        b"\x82\xa4kind\xabWorkerReady\xa4info\x81\xa1a\xdd\xff\xff\xff\xff",
        spoiled(Register(member=MEMBER), ("member", "color"), "red"),
        spoiled(Register(member=MEMBER), ("member", "role"), "cook"),
        spoiled(Register(member=MEMBER), ("member", "rank"), "0"),
        spoiled(REPORT, ("generation", "members"), None),
        spoiled(REPORT, ("generation", "members", 0, "name"), 7),
        spoiled(REPORT, ("placement", "banks"), [[]]),
        spoiled(REPORT, (*MAPS, "num_experts"), 9),
        spoiled(REPORT, (*MAPS, "split"), []),
        spoiled(REPORT, (*MAPS, "split", 0), [1.0]),
        spoiled(REPORT, (*MAPS, "decode_device"), [0]),
        spoiled(REPORT, (*MAPS, "physical_to_logical", 0, 0), 77),
    ],
    ids=lambda body: repr(body[:40]),
)
def test_rubbish_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a control frame"):
        decode(body)


@pytest.mark.parametrize("frame", SAMPLES, ids=lambda f: type(f).__name__)
def test_random_bytes_never_raise_anything_else(frame: ControlFrame) -> None:
    draw = random.Random(1)
    good = encode(frame)[4:]
    for _ in range(200):
        data = bytearray(good)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            decode(bytes(data))
        except ProtocolError:
            continue


def test_a_peer_without_proof_may_send_handshake_frames_only() -> None:
    hello = ControlHello(worker="expert-0", nonce="ab", release="9.9")
    assert decode_hello(encode(hello)[4:]) == hello
    with pytest.raises(ProtocolError):
        decode_hello(encode(DrainRequest())[4:])


def test_the_hello_of_another_release_can_still_be_read() -> None:
    data = packed(kind="ControlHello", worker="expert-0", nonce="ab", release="9.9", color="red")
    assert decode_hello(data) == ControlHello(worker="expert-0", nonce="ab", release="9.9")


@pytest.mark.parametrize("length", [0, 1025, 2**32 - 1])
def test_a_length_out_of_bounds_is_a_protocol_error(length: int) -> None:
    with pytest.raises(ProtocolError, match="must be 1 to 1024"):
        frame_length(struct.pack(">I", length), 1024)
