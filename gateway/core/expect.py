"""``Expect: 100-continue``: a client waits for the server before it sends the body."""

from __future__ import annotations

from collections.abc import Mapping


def waits_for_continue(headers: Mapping[str, str]) -> bool:
    """Whether the client sends its body only after ``100 Continue``."""
    return headers.get("expect", "").lower() == "100-continue"
