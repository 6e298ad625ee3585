"""Fields of a conversation's messages that templates call by several names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REASONING_NAMES = ("reasoning_content", "thinking")
"""What the model said to itself in an earlier answer: as clients send it, and gpt-oss's name."""


def with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under every name that templates use."""
    found = [message[name] for name in REASONING_NAMES if message.get(name)]
    return {**dict.fromkeys(REASONING_NAMES, found[0]), **message} if found else dict(message)
