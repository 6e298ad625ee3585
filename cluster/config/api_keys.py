"""API keys are kept as SHA-256 digests. The keys themselves leave no command line or file.

Keys are random and long, so a plain hash is enough: they cannot be found by trial.
"""

from __future__ import annotations

import hashlib
import re

_HASHED = re.compile("sha256:[0-9a-f]{64}")
_PREFIX = "sha256:"


def hash_key(key: str) -> str:
    """``sha256:`` and 64 hex digits; what is of that form is a digest already."""
    return key if is_hashed(key) else f"{_PREFIX}{digest_of(key).hex()}"


def is_hashed(key: str) -> bool:
    """Whether a text is a digest in the form of ``hash_key``."""
    return _HASHED.fullmatch(key) is not None


def digest_of(key: str) -> bytes:
    """SHA-256 of a key, [32] bytes. A client's key is never taken for a digest."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def stored_digest(hashed: str) -> bytes:
    """The bytes of what ``hash_key`` returned."""
    return bytes.fromhex(hashed.removeprefix(_PREFIX))
