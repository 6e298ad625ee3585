"""Which headers a ``KeyRing`` accepts."""

from __future__ import annotations

import pytest

from cluster.core import errors
from gateway.auth.auth import KeyRing


@pytest.mark.parametrize(
    ("authorization", "api_key", "ok"),
    [
        ("Bearer secret", None, True),
        ("bearer other", None, True),
        (None, "secret", True),
        (None, None, False),
        ("Bearer wrong", None, False),
        ("Bearer secre", None, False),
        ("Basic secret", None, False),
        ("secret", None, False),
        ("Bearer \udcff", None, False),
    ],
)
def test_headers(authorization: str | None, api_key: str | None, ok: bool) -> None:
    ring = KeyRing(["secret", "other"])
    if ok:
        ring.check(authorization, api_key)
    else:
        with pytest.raises(errors.AuthenticationError):
            ring.check(authorization, api_key)


def test_a_ring_without_keys_accepts_every_caller() -> None:
    KeyRing().check(None)
