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
"""Maximum size in bytes of a ``Hello`` or ``GatewayProof``, which may come from a stranger."""


class Hello(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """First message of each side in the handshake of an engine stream.

    Unknown fields are ignored, so that an error can name the release of the other side.
    """

    name: str
    nonce: str = ""
    release: str = ""


class GatewayProof(Message, frozen=True, kw_only=True):
    """Message with the gateway's proof, over both nonces, that it knows the cluster token."""

    proof: str


HELLO: Codec[Hello] = Codec(Hello, "the hello of an engine stream", HandshakeError)
PROOF: Codec[GatewayProof] = Codec(GatewayProof, "a gateway's proof", HandshakeError)


class _Handshake:
    """Base class of both sides of the handshake on an engine stream, with their first messages."""

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
    """The gateway's side of the handshake on an engine stream.

    All methods except ``start`` raise ``HandshakeError``.
    """

    is_caller = True

    def start(self) -> bytes:
        """Return the first message to send to the worker."""
        return HELLO.encode(self._own_hello)

    def prove(self, challenge: bytes) -> bytes:
        """Check the worker's first message, and return the message with the gateway's proof."""
        self._read_hello(challenge)
        return PROOF.encode(GatewayProof(proof=self._proof.make_proof()))

    def finish(self, hello: bytes) -> EngineHello:
        """Decode the worker's ``EngineHello``, and check that it proves the token."""
        facts = ENGINE_HELLO.decode(hello)
        if not self._proof.is_peer_proof(facts.proof):
            raise HandshakeError(f"{facts.worker} does not know the cluster token")
        return facts


class WorkerHandshake(_Handshake):
    """The worker's side of the handshake on an engine stream.

    ``challenge`` and ``finish`` raise ``HandshakeError``.
    """

    @property
    def gateway(self) -> str:
        """Name of the gateway from its first message; empty before ``challenge``."""
        return self._peer_hello.name

    def challenge(self, hello: bytes) -> bytes:
        """Check the gateway's first message, and return the reply with this worker's nonce."""
        self._read_hello(hello)
        return HELLO.encode(self._own_hello)

    def finish(self, proof: bytes, facts: EngineHello) -> bytes:
        """Check that the gateway knows the token; return the encoded ``EngineHello`` to send.

        ``facts``: the description of the worker, to which its proof is added.
        """
        if not self._proof.is_peer_proof(PROOF.decode(_bounded(proof)).proof):
            raise HandshakeError("the cluster token differs")
        return ENGINE_HELLO.encode(replace(facts, proof=self._proof.make_proof()))


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_HELLO_BYTES:
        size = f"a message of {len(data)} bytes in the handshake"
        raise HandshakeError(f"{size}: at most {MAX_HELLO_BYTES}")
    return data
