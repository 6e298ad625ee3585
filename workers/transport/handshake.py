"""Handshake of two workers: both prove the cluster token, then compare their configurations.

    connector                                   listener
    hello(nonce)                        ->
                                        <-      challenge(nonce)
    proof, identity                     ->
                                        <-      proof, identity   |   refusal: a short reason

A proof is HMAC-SHA256 under the token over both nonces, the sender's message and the sender's side
of the connection, so that no proof can be reflected. Until the connector has proved the token, it
receives only a random nonce. Each message: 4 bytes magic, 2 bytes length, then a message of
``cluster.core.codec``.

``ListenerHandshake`` and ``ConnectorHandshake`` are state machines that take and return bytes;
``acceptor`` and ``peer_link`` send and receive these bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Annotated, Final

from msgspec import Meta

from cluster.core.codec import Codec, Message
from cluster.core.errors import HandshakeError
from cluster.core.proof import TokenProof
from cluster.core.release import Build, differing_item
from cluster.core.topology import Role

MAX_HELLO_BYTES: Final = 4096
"""Maximum size of a handshake message in bytes."""
_PREFIX: Final = struct.Struct("!4sH")
_MAGIC: Final = b"EMhs"


class PeerIdentity(Build, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=False):
    """Identity of a worker in a handshake.

    Unknown fields of another release are ignored, so that an error can name the release.
    """

    name: str
    """Name of the worker, unique in the cluster and never reused."""
    role: Role
    rank: int
    """Rank of the worker among the attention workers, or among the expert workers."""
    generation: int = 0
    """Current generation of the worker, or the generation for which the worker connects."""

    @property
    def build(self) -> Build:
        """The fields that must be equal on all workers, such as release and configuration."""
        return Build(**{name: getattr(self, name) for name in Build.__struct_fields__})


class _Refusal(Message, frozen=True, kw_only=True, tag=True):
    reason: str
    generation: int = 0
    """Current generation of the listener that refuses a connection."""


class _Nonce(Message, frozen=True, kw_only=True):
    nonce: Annotated[str, Meta(min_length=1)]


class _Signed(Message, frozen=True, kw_only=True):
    words: bytes
    """The message that ``proof`` covers: an encoded ``PeerIdentity`` or ``_Refusal``."""
    proof: str


_NONCE: Codec[_Nonce] = Codec(_Nonce, "a nonce", HandshakeError)
_SIGNED: Codec[_Signed] = Codec(_Signed, "a proof", HandshakeError)
_WORDS: Codec[PeerIdentity | _Refusal] = Codec(
    PeerIdentity | _Refusal, "the content of a handshake", HandshakeError
)


class _Handshake:
    """Base class of both sides of the handshake: message framing, nonces and proofs."""

    is_caller = False

    def __init__(self, me: PeerIdentity, token: str) -> None:
        self._me = me
        self._proof = TokenProof(token, "data", is_caller=self.is_caller)
        self._received = bytearray()
        self.peer: PeerIdentity | None = None
        """Identity of the peer; None until the peer has proved the cluster token."""
        self.done = False
        """Whether the handshake is complete, also if the listener refuses the peer."""

    def feed(self, data: bytes) -> bytes:
        """Process received bytes; return the bytes to send, which may be empty.

        Raises ``HandshakeError`` if the peer is invalid or refuses the connection.
        """
        self._received += data
        answer = b""
        while not self.done and (message := self._next_message()) is not None:
            answer += self._handle(message)
        if self.done and self._received:
            raise HandshakeError("bytes after the end of the handshake")
        return answer

    def _handle(self, message: bytes) -> bytes:
        raise NotImplementedError

    def _hello(self) -> bytes:
        return _pack(_NONCE.encode(_Nonce(nonce=self._proof.nonce)))

    def _next_message(self) -> bytes | None:
        if not _MAGIC.startswith(bytes(self._received[:4])):
            raise HandshakeError("this is not the handshake of an expertmesh worker")
        if len(self._received) < _PREFIX.size:
            return None
        length = _PREFIX.unpack_from(self._received)[1]
        if length > MAX_HELLO_BYTES:
            raise HandshakeError(f"handshake message of {length} bytes: at most {MAX_HELLO_BYTES}")
        if len(self._received) < _PREFIX.size + length:
            return None
        body = bytes(self._received[_PREFIX.size : _PREFIX.size + length])
        del self._received[: _PREFIX.size + length]
        return body

    def _signed(self, words: PeerIdentity | _Refusal) -> bytes:
        data = _WORDS.encode(words)
        return _pack(_SIGNED.encode(_Signed(words=data, proof=self._proof.make_proof(data))))

    def _verified(self, message: bytes) -> PeerIdentity | _Refusal:
        signed = _SIGNED.decode(message)
        if not self._proof.is_peer_proof(signed.proof, signed.words):
            raise HandshakeError("the cluster token differs")
        return _WORDS.decode(signed.words)


class ListenerHandshake(_Handshake):
    """State of a handshake on the side that accepted the connection."""

    def __init__(
        self, me: PeerIdentity, token: str, refuse: Callable[[PeerIdentity], str | None]
    ) -> None:
        """``refuse`` returns why a peer that has proved the token is refused, or None."""
        super().__init__(me, token)
        self._refuse = refuse
        self.refusal: str | None = None
        """Reason for which this side refuses the peer; None if the peer is accepted so far."""

    def _handle(self, message: bytes) -> bytes:
        if not self._proof.their_nonce:
            self._proof.their_nonce = _NONCE.decode(message).nonce
            return self._hello()
        peer = self._verified(message)
        if not isinstance(peer, PeerIdentity):
            raise HandshakeError("the connector sends no identity")
        self.done, self.peer = True, peer
        differing = differing_item(self._me.name, self._me, peer.name, peer)
        self.refusal = differing or self._refuse(peer)
        if self.refusal is None:
            return self._signed(self._me)
        return self._signed(_Refusal(reason=self.refusal, generation=self._me.generation))


class ConnectorHandshake(_Handshake):
    """State of a handshake on the side that opened the connection."""

    is_caller = True
    has_verdict = False
    """Whether the listener has proved the cluster token; a retry after an error is then useless."""
    is_outdated = False
    """Whether the listener has refused this worker and is in a later generation than it."""

    def start(self) -> bytes:
        """Return the first bytes to send."""
        return self._hello()

    def _handle(self, message: bytes) -> bytes:
        if not self._proof.their_nonce:
            self._proof.their_nonce = _NONCE.decode(message).nonce
            return self._signed(self._me)
        words = self._verified(message)
        self.has_verdict = True
        if isinstance(words, _Refusal):
            self.is_outdated = words.generation > self._me.generation
            raise HandshakeError(f"refused: {words.reason}")
        self.peer = words
        reason = differing_item(self._me.name, self._me, words.name, words)
        if reason is not None:
            raise HandshakeError(reason)
        self.done = True
        return b""


def _pack(body: bytes) -> bytes:
    if len(body) > MAX_HELLO_BYTES:
        raise HandshakeError(f"handshake message of {len(body)} bytes: at most {MAX_HELLO_BYTES}")
    return _PREFIX.pack(_MAGIC, len(body)) + body
