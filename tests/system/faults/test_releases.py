"""Workers and gateways of another release are refused by name, and the cluster serves on."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.harness.engine_stream import TOKEN, EngineStream
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.core.errors import HandshakeError
from cluster.core.frames import ControlFrame, Heartbeat, StatusReply
from cluster.core.release import RELEASE
from workers.process.control.control_client import ControlClient
from workers.requests.request import Request, SamplingParams
from workers.transport.handshake import ConnectorHandshake

OTHER = "9.9.9"


def request(name: str) -> Request:
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    return Request(request_id=name, prompt=(5, 6, 7), params=params)


def come_as_gateway(cluster: ThreadCluster) -> str:
    """A gateway of another release opens an engine stream; its error."""
    stream = EngineStream(cluster.worker("attention-0")["engine_address"], release=OTHER)
    with pytest.raises(ConnectionError) as caught:
        stream.next()
    stream.close()
    return str(caught.value)


def come_as_worker(cluster: ThreadCluster) -> str:
    """A worker of another release calls the controller; its error."""

    def nothing(frame: ControlFrame) -> None:
        raise AssertionError(f"{frame} was sent to a worker that was refused")

    server = cluster.actor.runner.server
    assert server is not None
    client = ControlClient(
        server.address,
        TOKEN,
        "expert-0",
        nothing,
        heartbeat=lambda: Heartbeat(progress=0, idle=True, generation=0),
        status=lambda: StatusReply(token=0),
        release=OTHER,
    )
    with pytest.raises(HandshakeError) as caught:
        client.start()
    return str(caught.value)


def come_as_peer(cluster: ThreadCluster) -> str:
    """A worker of another release opens an edge to a worker; its error."""
    there = cluster.group.workers["expert-0"]
    me = replace(cluster.group.attention("attention-0")._context.me, release=OTHER)
    handshake = ConnectorHandshake(me, TOKEN)
    host, _, port = there.member.data_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as sock:
        sock.sendall(handshake.start())
        with pytest.raises(HandshakeError) as caught:
            _finish(handshake, sock)
    return str(caught.value)


def _finish(handshake: ConnectorHandshake, sock: socket.socket) -> None:
    while data := sock.recv(4096):
        sock.sendall(handshake.feed(data))


@pytest.mark.parametrize(
    ("come", "refusal"),
    [
        (come_as_gateway, f"release {OTHER} of test, {RELEASE} of attention-0"),
        (come_as_worker, f"release {RELEASE} of the controller, {OTHER} of expert-0"),
        (come_as_peer, f"release of attention-0 is {OTHER}, expert-0 has {RELEASE}"),
    ],
)
def test_another_release_is_refused_by_name_while_the_cluster_serves(
    come: Callable[[ThreadCluster], str], refusal: str, tiny_checkpoint: Path
) -> None:
    cluster = ThreadCluster(make_config(tiny_checkpoint, 1, 1))
    with serving(cluster):
        stream = cluster.stream()
        calm = stream.finish([request("calm")])["calm"].tokens
        stream.send(request("during"))
        assert stream.next().request_id == "during"
        assert refusal in come(cluster)
        after = stream.finish([request("after")])["after"].tokens
        assert after == calm
        snapshot = cluster.snapshot()
        assert (snapshot["state"], snapshot["generation"]) == ("SERVING", 1)
        stream.close()
