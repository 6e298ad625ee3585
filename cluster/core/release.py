"""The release of this program, which both ends of every connection must share."""

from __future__ import annotations

from cluster.core.errors import HandshakeError
from cluster.core.versions import own_version

RELEASE = own_version()
"""Version of expertmesh in this process."""


def check_release(theirs: str, peer: str, ours: str, me: str) -> None:
    """Raise ``HandshakeError`` that names both ends where their releases differ."""
    if theirs != ours:
        known = f"release {theirs[:64]}" if theirs else "no release"
        raise HandshakeError(f"{known} of {peer}, {ours} of {me}: releases must be equal")
