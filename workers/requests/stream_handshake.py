"""How a gateway and an attention worker authenticate on the engine stream: bytes in, bytes out.

    gateway                                      attention worker
    Hello (name, nonce, release)         ->
                                         <-      Hello (name, nonce, release)
    GatewayProof                         ->
                                         <-      EngineHello (proof, facts)

Neither side sends the token. Until the other side has proved that it knows the token, a side sends
its name, its release, a nonce and a proof; the gateway proves first.
"""

from __future__ import annotations

from msgspec.structs import replace

from cluster.core.codec import Codec, Message
from cluster.core.errors import HandshakeError
from cluster.core.proof import TokenProof
from cluster.core.release import check_release
from workers.requests.wire import ENGINE_HELLO, EngineHello

MAX_HELLO_BYTES = 4096
"""Longest message before the proof."""


class Hello(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A side's first message. Fields of another release are ignored, so that it can be named."""

    name: str
    nonce: str = ""
    release: str = ""


class GatewayProof(Message, frozen=True, kw_only=True):
    """A gateway's proof over both nonces."""

    proof: str


HELLO: Codec[Hello] = Codec(Hello, "the hello of an engine stream", HandshakeError)
PROOF: Codec[GatewayProof] = Codec(GatewayProof, "a gateway's proof", HandshakeError)


class _Handshake:
    """What both sides share."""

    is_caller = False

    def __init__(self, token: str, name: str, release: str) -> None:
        self._proof = TokenProof(token, "engine", is_caller=self.is_caller)
        self._mine = Hello(name=name, nonce=self._proof.nonce, release=release)
        self._theirs = Hello(name="")

    def _greet(self, hello: bytes) -> None:
        self._theirs = HELLO.decode(_bounded(hello))
        mine, theirs = self._mine, self._theirs
        self._proof.their_nonce = theirs.nonce
        check_release(theirs.release, theirs.name, mine.release, mine.name)


class GatewayHandshake(_Handshake):
    """The gateway's side. Every method raises ``HandshakeError``."""

    is_caller = True

    def start(self) -> bytes:
        """The first bytes to send."""
        return HELLO.encode(self._mine)

    def answer(self, challenge: bytes) -> bytes:
        """The proof."""
        self._greet(challenge)
        return PROOF.encode(GatewayProof(proof=self._proof.make_proof()))

    def finish(self, hello: bytes) -> EngineHello:
        """The hello of a worker that knows the token."""
        facts = ENGINE_HELLO.decode(hello)
        if not self._proof.is_peer_proof(facts.proof):
            raise HandshakeError(f"{facts.worker} does not know the cluster token")
        return facts


class WorkerHandshake(_Handshake):
    """The worker's side. Every method raises ``HandshakeError``."""

    @property
    def gateway(self) -> str:
        """The name that the gateway gives itself."""
        return self._theirs.name

    def challenge(self, hello: bytes) -> bytes:
        """The answer to a gateway's first bytes."""
        self._greet(hello)
        return HELLO.encode(self._mine)

    def finish(self, proof: bytes, facts: EngineHello) -> bytes:
        """The hello to a gateway that knows the token."""
        if not self._proof.is_peer_proof(PROOF.decode(_bounded(proof)).proof):
            raise HandshakeError("the cluster token differs")
        return ENGINE_HELLO.encode(replace(facts, proof=self._proof.make_proof()))


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_HELLO_BYTES:
        size = f"a message of {len(data)} bytes in the handshake"
        raise HandshakeError(f"{size}: at most {MAX_HELLO_BYTES}")
    return data
