"""Proofs of the cluster token over two nonces, which both sides of internal connections give.

A proof names the kind of connection and the side, so that none can be reflected or used elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


def new_nonce() -> str:
    """A nonce for one connection."""
    return secrets.token_hex(16)


def make_proof(
    token: str, channel: str, side: str, nonces: tuple[str, str], words: bytes | None = None
) -> str:
    """What ``side`` sends to show that it knows the token.

    ``nonces`` are those of the side that connects and of the other one; ``words`` are what it
    signs beside them.
    """
    text = "|".join((f"expertmesh-{channel}", side, *nonces)).encode()
    data = text if words is None else text + b"|" + words
    return hmac.new(token.encode(), data, hashlib.sha256).hexdigest()


def is_proof(given: str, expected: str) -> bool:
    """Whether they are equal, in constant time."""
    return hmac.compare_digest(given.encode(), expected.encode())
