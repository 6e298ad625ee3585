"""How a gateway and an attention worker authenticate on the engine stream: bytes in, bytes out.

    gateway                                      attention worker
    Hello (name, nonce, release)         ->
                                         <-      EngineChallenge (name, nonce, release)
    GatewayProof                         ->
                                         <-      EngineHello (proof, facts)

Neither side sends the token. Until the other side has proved that it knows the token, a side sends
its name, its release, a nonce and a proof; the gateway proves first.
"""

from __future__ import annotations

from typing import TypeVar

from msgspec.structs import replace

from cluster.core.codec import Codec, Message
from cluster.core.errors import HandshakeError, ProtocolError
from cluster.core.proof import is_proof, make_proof, new_nonce
from cluster.core.release import check_release
from workers.requests.wire import ENGINE_HELLO, EngineHello

MAX_HELLO_BYTES = 4096
"""Longest message before the proof."""
_T = TypeVar("_T")


class Hello(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A gateway's first message. Fields of another release are ignored, so that it can be named."""

    gateway: str
    nonce: str = ""
    release: str = ""


class EngineChallenge(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A worker's first message; as ``Hello``."""

    worker: str
    nonce: str = ""
    release: str = ""


class GatewayProof(Message, frozen=True, kw_only=True):
    """A gateway's proof over both nonces."""

    proof: str


HELLO: Codec[Hello] = Codec(Hello, "a gateway's hello")
CHALLENGE: Codec[EngineChallenge] = Codec(EngineChallenge, "an engine's challenge")
PROOF: Codec[GatewayProof] = Codec(GatewayProof, "a gateway's proof")


class GatewayHandshake:
    """The gateway's side. Every method raises ``HandshakeError``."""

    def __init__(self, token: str, gateway: str, release: str) -> None:
        self._token = token
        self._hello = Hello(gateway=gateway, nonce=new_nonce(), release=release)
        self._nonces = ("", "")

    def start(self) -> bytes:
        """The first bytes to send."""
        return HELLO.encode(self._hello)

    def answer(self, challenge: bytes) -> bytes:
        """The proof."""
        theirs, mine = _decoded(CHALLENGE, challenge), self._hello
        check_release(theirs.release, theirs.worker, mine.release, mine.gateway)
        self._nonces = (mine.nonce, theirs.nonce)
        proof = make_proof(self._token, "engine", "gateway", self._nonces)
        return PROOF.encode(GatewayProof(proof=proof))

    def finish(self, hello: bytes) -> EngineHello:
        """The hello of a worker that knows the token."""
        facts = _decoded(ENGINE_HELLO, hello, limit=None)
        if not is_proof(facts.proof, make_proof(self._token, "engine", "worker", self._nonces)):
            raise HandshakeError(f"{facts.worker} does not know the cluster token")
        return facts


class WorkerHandshake:
    """The worker's side. Every method raises ``HandshakeError``."""

    def __init__(self, token: str, worker: str, release: str) -> None:
        self._token = token
        self._challenge = EngineChallenge(worker=worker, nonce=new_nonce(), release=release)
        self._nonces = ("", "")
        self.gateway = ""
        """The name that the gateway gives itself."""

    def challenge(self, hello: bytes) -> bytes:
        """The answer to a gateway's first bytes."""
        theirs, mine = _decoded(HELLO, hello), self._challenge
        self.gateway = theirs.gateway
        check_release(theirs.release, theirs.gateway, mine.release, mine.worker)
        self._nonces = (theirs.nonce, mine.nonce)
        return CHALLENGE.encode(mine)

    def finish(self, proof: bytes, facts: EngineHello) -> bytes:
        """The hello to a gateway that knows the token."""
        theirs = _decoded(PROOF, proof).proof
        if not is_proof(theirs, make_proof(self._token, "engine", "gateway", self._nonces)):
            raise HandshakeError("the cluster token differs")
        mine = make_proof(self._token, "engine", "worker", self._nonces)
        return ENGINE_HELLO.encode(replace(facts, proof=mine))


def _decoded(codec: Codec[_T], data: bytes, limit: int | None = MAX_HELLO_BYTES) -> _T:
    if limit is not None and len(data) > limit:
        raise HandshakeError(f"a message of {len(data)} bytes in the handshake: at most {limit}")
    try:
        return codec.decode(data)
    except ProtocolError as err:
        raise HandshakeError(str(err)) from err
