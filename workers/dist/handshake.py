"""How two workers convince each other: of the cluster token first, of everything else after it.

    connector                                   listener
    hello(nonce)                        ->
                                        <-      challenge(nonce)
    proof, who I am                     ->
                                        <-      proof, who I am   |   refusal: a short reason

A proof is HMAC-SHA256 under the token over both nonces and the sender's own words, with the
sender's side in it, so that nothing can be reflected. Until the connector has proved the token it
learns nothing but a random nonce. Each message: 4 bytes magic, 2 bytes length, JSON.

Both classes are plain state machines, bytes in and bytes out; ``hub`` moves the bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, get_args

from cluster.errors import HandshakeError
from cluster.topology import Role

PROTOCOL_VERSION: Final = 1
MAX_HELLO_BYTES: Final = 4096
"""Most bytes of one handshake message."""
_PREFIX: Final = struct.Struct("!4sH")
_MAGIC: Final = b"EMhs"


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerIdentity:
    """What a worker says of itself in the handshake."""

    name: str
    """Worker name, unique for ever."""
    role: Role
    """Pool."""
    rank: int
    """Rank in its pool."""
    checkpoint_id: str
    """Identity of the checkpoint it serves."""
    config_hash: str
    """``ClusterConfig.fingerprint``."""
    numerics: str = ""
    """Of a deterministic cluster: hash of how it computes."""
    generation: int = 0
    """Generation that it is in, or that it connects for."""
    version: int = PROTOCOL_VERSION
    """Version of the data plane."""


class _Handshake:
    """What both sides share: framing, nonces, proofs."""

    side: str
    other_side: str

    def __init__(self, me: PeerIdentity, token: str) -> None:
        self._me = me
        self._key = token.encode()
        self._nonce = secrets.token_hex(16)
        self._their_nonce = ""
        self._received = bytearray()
        self.peer: PeerIdentity | None = None
        """Set as soon as the peer has proved the token."""
        self.done = False
        """True when both sides have agreed."""

    def feed(self, data: bytes) -> bytes:
        """Take received bytes, return bytes to send. Raises ``HandshakeError``."""
        self._received += data
        answer = b""
        while not self.done and (message := self._next_message()) is not None:
            answer += self._handle(message)
        if self.done and self._received:
            raise HandshakeError("bytes after the end of the handshake")
        return answer

    def _handle(self, message: dict[str, Any]) -> bytes:
        raise NotImplementedError

    def _next_message(self) -> dict[str, Any] | None:
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
        return _parse(body, "handshake message is")

    def _proof(self, side: str, words: str) -> str:
        nonces = (self._nonce, self._their_nonce)
        first, second = nonces if self.side == "connector" else nonces[::-1]
        text = "|".join(("expertmesh-data", side, first, second, words))
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def _signed(self, words: str) -> bytes:
        return _pack({"words": words, "proof": self._proof(self.side, words)})

    def _verified(self, message: dict[str, Any]) -> str:
        words, proof = _text(message, "words"), _text(message, "proof")
        if not hmac.compare_digest(self._proof(self.other_side, words), proof):
            raise HandshakeError("the cluster token differs")
        return words


class ListenerHandshake(_Handshake):
    """The side that accepted the connection."""

    side = "listener"
    other_side = "connector"

    def __init__(
        self, me: PeerIdentity, token: str, refuse: Callable[[PeerIdentity], str | None]
    ) -> None:
        """``refuse`` tells why a peer that knows the token cannot be taken, None if it can."""
        super().__init__(me, token)
        self._refuse = refuse
        self.refusal: str | None = None
        """Why the peer was refused; the answer to it is still to be sent."""

    def _handle(self, message: dict[str, Any]) -> bytes:
        if not self._their_nonce:
            self._their_nonce = _text(message, "nonce")
            return _pack({"nonce": self._nonce})
        words = self._verified(message)
        self.done = True
        self.peer = _identity(words)
        self.refusal = differences(self._me, self.peer) or self._refuse(self.peer)
        if self.refusal is not None:
            return self._signed(json.dumps({"refused": self.refusal}))
        return self._signed(_words(self._me))


class ConnectorHandshake(_Handshake):
    """The side that opened the connection."""

    side = "connector"
    other_side = "listener"
    has_verdict = False
    """The listener has proved the token, and the two do not fit: trying again is no use."""

    def start(self) -> bytes:
        """The first bytes to send."""
        return _pack({"nonce": self._nonce})

    def _handle(self, message: dict[str, Any]) -> bytes:
        if not self._their_nonce:
            self._their_nonce = _text(message, "nonce")
            return self._signed(_words(self._me))
        words = self._verified(message)
        self.has_verdict = True
        refused = _parse(words, "handshake words are").get("refused")
        if refused is not None:
            raise HandshakeError(f"refused: {refused}")
        self.peer = _identity(words)
        reason = differences(self._me, self.peer)
        if reason is not None:
            raise HandshakeError(reason)
        self.done = True
        return b""


def differences(mine: PeerIdentity, theirs: PeerIdentity) -> str | None:
    """Which item that must be equal on all workers differs; None if all agree."""
    items = (
        ("protocol version", mine.version, theirs.version),
        ("checkpoint", mine.checkpoint_id, theirs.checkpoint_id),
        ("configuration", mine.config_hash, theirs.config_hash),
        ("arithmetic", mine.numerics, theirs.numerics),
    )
    for item, here, there in items:
        if here != there:
            return f"{item} of {theirs.name} is {there}, {mine.name} has {here}"
    return None


def _pack(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    if len(body) > MAX_HELLO_BYTES:
        raise HandshakeError(f"handshake message of {len(body)} bytes: at most {MAX_HELLO_BYTES}")
    return _PREFIX.pack(_MAGIC, len(body)) + body


def _text(message: dict[str, Any], field: str) -> str:
    value = message.get(field)
    if not isinstance(value, str) or not value:
        raise HandshakeError(f"handshake message without {field}")
    return value


def _words(identity: PeerIdentity) -> str:
    return json.dumps(asdict(identity), sort_keys=True)


def _parse(text: str | bytes, what_is: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise HandshakeError(f"{what_is} no JSON: {err}") from err
    if not isinstance(values, dict):
        raise HandshakeError(f"{what_is} no object")
    return values


def _identity(words: str) -> PeerIdentity:
    values = _parse(words, "handshake words are")
    kinds = {f.name: int if f.name in ("rank", "generation", "version") else str for f in _FIELDS}
    if set(values) != set(kinds) or any(type(values[n]) is not k for n, k in kinds.items()):
        raise HandshakeError("handshake identity has wrong fields")
    if values["role"] not in get_args(Role):
        raise HandshakeError(f"handshake role {values['role']!r} is not known")
    return PeerIdentity(**values)


_FIELDS = fields(PeerIdentity)
