"""Proofs that a side of an internal connection knows the cluster token, made from two nonces.

A proof is an HMAC over both nonces, the kind of connection and the side, so that nothing can
reflect or reuse the proof.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from msgspec import msgpack


class TokenProof:
    """Makes the proof that one side of a connection knows the cluster token, and checks the proof
    of the other side."""

    def __init__(self, token: str, channel: str, *, is_caller: bool, their_nonce: str = "") -> None:
        """``channel``: kind of connection. ``is_caller``: whether this side has connected."""
        self._token = token
        self._channel = channel
        self._is_caller = is_caller
        self.nonce = secrets.token_hex(16)
        self.their_nonce = their_nonce
        """Nonce of the other side; empty until it is known."""

    def make_proof(self, words: bytes = b"") -> str:
        """Return the proof that this side knows the cluster token and has sent ``words``."""
        return self._proof(self._is_caller, words)

    def is_peer_proof(self, given: str, words: bytes = b"") -> bool:
        """Return, in constant time, whether ``given`` proves that the other side knows the token
        and has sent ``words``."""
        expected = self._proof(not self._is_caller, words)
        return hmac.compare_digest(given.encode(), expected.encode())

    def _proof(self, of_caller: bool, words: bytes) -> str:
        nonces = (self.nonce, self.their_nonce)
        side = "caller" if of_caller else "listener"
        ordered = nonces if self._is_caller else nonces[::-1]
        data = msgpack.encode((self._channel, side, *ordered, words))
        return hmac.new(self._token.encode(), data, hashlib.sha256).hexdigest()
