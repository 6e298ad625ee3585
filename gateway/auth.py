"""API keys: who may ask for more than ``/health`` and ``/ready``."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from cluster.errors import AuthenticationError


class KeyRing:
    """The accepted keys, kept as SHA-256 digests; an empty ring accepts everybody."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def check(self, authorization: str | None, api_key: str | None = None) -> None:
        """Accept a request by its ``Authorization`` header, or by its ``api-key`` header.

        Raises:
            AuthenticationError: keys are asked for and none that is known was given.
        """
        if not self._digests:
            return
        key = _bearer(authorization) or api_key
        if not key:
            raise AuthenticationError("an API key is needed: Authorization: Bearer KEY")
        given = _digest(key)
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        if not any(matches):
            raise AuthenticationError("the API key is not known")


def _bearer(authorization: str | None) -> str | None:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
