"""``Expect: 100-continue``: clients that send a body only once the server asks for it."""

from __future__ import annotations

from collections.abc import Mapping


def waits_to_send(headers: Mapping[str, str]) -> bool:
    """Whether the client sends its body only after ``100 Continue``."""
    return headers.get("expect", "").lower() == "100-continue"
