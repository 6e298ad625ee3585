"""``Expect: 100-continue``: clients that wait for the server before they send a body."""

from __future__ import annotations

from collections.abc import Mapping


def waits_for_continue(headers: Mapping[str, str]) -> bool:
    """Whether the client sends its body only after ``100 Continue``."""
    return headers.get("expect", "").lower() == "100-continue"
