"""Both ends of an engine stream prove the cluster token, and neither sends it."""

from __future__ import annotations

import contextlib

import msgspec
import pytest

from cluster.core.errors import HandshakeError
from cluster.core.proof import TokenProof
from tests.workers.process.test_gateway_silence import FACTS
from workers.requests.stream_handshake import (
    HELLO,
    MAX_HELLO_BYTES,
    PROOF,
    GatewayHandshake,
    GatewayProof,
    Hello,
    WorkerHandshake,
)
from workers.requests.wire import ENGINE_HELLO

TOKEN = "the token of this cluster"


def _ends(
    gateway_token: str = TOKEN, worker_token: str = TOKEN, worker_release: str = "1"
) -> tuple[GatewayHandshake, WorkerHandshake]:
    gateway = GatewayHandshake(gateway_token, "gateway-0", "1")
    return gateway, WorkerHandshake(worker_token, "attention-0", worker_release)


def test_the_token_is_never_sent() -> None:
    gateway, worker = _ends()
    sent = [gateway.start()]
    sent.append(worker.challenge(sent[-1]))
    sent.append(gateway.prove(sent[-1]))
    sent.append(worker.finish(sent[-1], FACTS))
    facts = gateway.finish(sent[-1])
    assert facts.max_model_len == FACTS.max_model_len
    assert worker.gateway == "gateway-0"
    assert not any(TOKEN.encode() in message for message in sent)


def test_a_gateway_without_the_token_gets_no_facts() -> None:
    gateway, worker = _ends(gateway_token="wrong")
    proof = gateway.prove(worker.challenge(gateway.start()))
    with pytest.raises(HandshakeError, match="the cluster token differs"):
        worker.finish(proof, FACTS)


@pytest.mark.parametrize("knows", ["wrong", ""])
def test_a_worker_without_the_token_is_refused(knows: str) -> None:
    gateway, worker = _ends()
    honest = gateway.prove(worker.challenge(gateway.start()))
    gateway, impostor = _ends(worker_token=knows)
    impostor.challenge(gateway.start())
    with pytest.raises(HandshakeError, match="attention-0 does not know the cluster token"):
        gateway.finish(worker.finish(honest, FACTS))  # of another stream
    with pytest.raises(HandshakeError, match="attention-0 does not know the cluster token"):
        gateway.finish(ENGINE_HELLO.encode(FACTS))


def test_a_proof_cannot_be_reflected() -> None:
    gateway = GatewayHandshake(TOKEN, "gateway-0", "1")
    nonce = HELLO.decode(gateway.start()).nonce
    challenge = HELLO.encode(Hello(name="attention-0", nonce=nonce, release="1"))
    proof = PROOF.decode(gateway.prove(challenge)).proof
    with pytest.raises(HandshakeError, match="does not know"):
        gateway.finish(ENGINE_HELLO.encode(msgspec.structs.replace(FACTS, proof=proof)))


def test_a_proof_of_another_kind_of_connection_is_refused() -> None:
    for channel, right in (("engine", True), ("control", False)):
        worker = WorkerHandshake(TOKEN, "attention-0", "1")
        proof = TokenProof(TOKEN, channel, is_caller=True)
        hello = Hello(name="g", nonce=proof.nonce, release="1")
        proof.their_nonce = HELLO.decode(worker.challenge(HELLO.encode(hello))).nonce
        with contextlib.nullcontext() if right else pytest.raises(HandshakeError, match="differs"):
            worker.finish(PROOF.encode(GatewayProof(proof=proof.make_proof())), FACTS)


def test_another_release_is_named_by_both_before_any_proof() -> None:
    gateway, worker = _ends(worker_release="9.9.9")
    hello = gateway.start()
    with pytest.raises(HandshakeError, match=r"release 1 of gateway-0, 9\.9\.9 of attention-0"):
        worker.challenge(hello)
    challenge = Hello(name="attention-0", nonce="n", release="9.9.9")
    with pytest.raises(HandshakeError, match=r"release 9\.9\.9 of attention-0, 1 of gateway-0"):
        gateway.prove(HELLO.encode(challenge))
    theirs = {"name": "g", "color": "red", "release": "9.9"}  # with fields of its own
    with pytest.raises(HandshakeError, match=r"release 9\.9 of g"):
        worker.challenge(msgspec.msgpack.encode(theirs))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"g" * (MAX_HELLO_BYTES + 1)])
def test_bytes_that_are_no_handshake_are_refused(data: bytes) -> None:
    gateway, worker = _ends()
    with pytest.raises(HandshakeError):
        worker.challenge(data)
    with pytest.raises(HandshakeError):
        gateway.prove(data)
    with pytest.raises(HandshakeError):
        worker.finish(data, FACTS)
    with pytest.raises(HandshakeError):
        gateway.finish(data)
