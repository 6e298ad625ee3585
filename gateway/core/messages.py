"""Fields of a conversation's messages that templates call by several names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

THINKING = "thinking"
REASONING_NAMES = ("reasoning_content", "reasoning", THINKING)
"""What the model said to itself in an earlier answer: as most clients send it, vLLM's newer name,
and the name in gpt-oss's template."""
PHASE, COMMENTARY_PHASE = "phase", "commentary"
"""A field of an assistant's message, and its value where more of the same turn follows."""


def with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning, if that is a text, under every name that templates use.

    gpt-oss's template refuses words for the user beside calls and ``thinking``: such a message has
    that name only from its client.
    """
    given = [message[name] for name in REASONING_NAMES if message.get(name)]
    if not given or not isinstance(given[0], str):
        return dict(message)
    is_refused = message.get("content") and message.get("tool_calls")
    names = REASONING_NAMES[:-1] if is_refused else REASONING_NAMES
    return {**message, **{name: message.get(name) or given[0] for name in names}}
