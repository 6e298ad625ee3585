"""Authentication between a gateway and an attention worker on the engine stream; no I/O.

    gateway                                      attention worker
    Hello (name, nonce, release)         ->
                                         <-      Hello (name, nonce, release)
    GatewayProof                         ->
                                         <-      EngineHello (proof, facts)

Neither side sends the token. The gateway proves first that it knows the token. Before a side has
received the other's proof, it sends only its name, its release, a nonce and a proof.
"""

from __future__ import annotations

from msgspec.structs import replace

from cluster.core.codec import Codec, Message
from cluster.core.errors import HandshakeError
from cluster.core.proof import TokenProof
from cluster.core.release import check_release
from workers.requests.wire import ENGINE_HELLO, EngineHello

MAX_HELLO_BYTES = 4096
"""Maximum size of a message that arrives before its sender has proved the token."""


class Hello(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A side's first message. Unknown fields are ignored, so that errors can name the release."""

    name: str
    nonce: str = ""
    release: str = ""


class GatewayProof(Message, frozen=True, kw_only=True):
    """A gateway's proof over both nonces."""

    proof: str


HELLO: Codec[Hello] = Codec(Hello, "the hello of an engine stream", HandshakeError)
PROOF: Codec[GatewayProof] = Codec(GatewayProof, "a gateway's proof", HandshakeError)


class _Handshake:
    """State of both sides of the handshake."""

    is_caller = False

    def __init__(self, token: str, name: str, release: str) -> None:
        self._proof = TokenProof(token, "engine", is_caller=self.is_caller)
        self._own_hello = Hello(name=name, nonce=self._proof.nonce, release=release)
        self._peer_hello = Hello(name="")

    def _read_hello(self, hello: bytes) -> None:
        self._peer_hello = HELLO.decode(_bounded(hello))
        own, peer = self._own_hello, self._peer_hello
        self._proof.their_nonce = peer.nonce
        check_release(peer.release, peer.name, own.release, own.name)


class GatewayHandshake(_Handshake):
    """The gateway's side. All methods except ``start`` raise ``HandshakeError``."""

    is_caller = True

    def start(self) -> bytes:
        """The first message to send."""
        return HELLO.encode(self._own_hello)

    def prove(self, challenge: bytes) -> bytes:
        """Verify the worker's hello and return the proof."""
        self._read_hello(challenge)
        return PROOF.encode(GatewayProof(proof=self._proof.make_proof()))

    def finish(self, hello: bytes) -> EngineHello:
        """Decode the worker's ``EngineHello``, and check that it proves the token."""
        facts = ENGINE_HELLO.decode(hello)
        if not self._proof.is_peer_proof(facts.proof):
            raise HandshakeError(f"{facts.worker} does not know the cluster token")
        return facts


class WorkerHandshake(_Handshake):
    """The worker's side. Both methods raise ``HandshakeError``."""

    @property
    def gateway(self) -> str:
        """The name in the gateway's hello."""
        return self._peer_hello.name

    def challenge(self, hello: bytes) -> bytes:
        """Check a gateway's hello and return the reply."""
        self._read_hello(hello)
        return HELLO.encode(self._own_hello)

    def finish(self, proof: bytes, facts: EngineHello) -> bytes:
        """Check that the gateway knows the token, and return the encoded ``EngineHello``."""
        if not self._proof.is_peer_proof(PROOF.decode(_bounded(proof)).proof):
            raise HandshakeError("the cluster token differs")
        return ENGINE_HELLO.encode(replace(facts, proof=self._proof.make_proof()))


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_HELLO_BYTES:
        size = f"a message of {len(data)} bytes in the handshake"
        raise HandshakeError(f"{size}: at most {MAX_HELLO_BYTES}")
    return data
