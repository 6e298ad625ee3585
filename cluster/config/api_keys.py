"""Hashes API keys: only SHA-256 digests of keys are in files and command lines.

A plain hash is sufficient, because keys are random and too long to be guessed.
"""

from __future__ import annotations

import hashlib
import re

_HASHED = re.compile("sha256:[0-9a-f]{64}")
_PREFIX = "sha256:"


def hash_key(key: str) -> str:
    """Return ``sha256:`` and the 64 hex digits of the key's digest; a hashed key is unchanged."""
    return key if is_hashed(key) else f"{_PREFIX}{digest_of(key).hex()}"


def is_hashed(key: str) -> bool:
    """Return whether a text is a hashed key in the format of ``hash_key``."""
    return _HASHED.fullmatch(key) is not None


def digest_of(key: str) -> bytes:
    """Return the SHA-256 of a key, [32] bytes, even if the key looks like a hashed key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def stored_digest(hashed: str) -> bytes:
    """Return the digest in a hashed key, [32] bytes."""
    return bytes.fromhex(hashed.removeprefix(_PREFIX))
