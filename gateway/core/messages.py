"""Message fields for which chat templates use different names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

THINKING = "thinking"
REASONING_NAMES = ("reasoning_content", "reasoning", THINKING)
"""Names of the reasoning in an assistant message: for most clients, newer vLLM versions, and the
template of gpt-oss."""
PHASE, COMMENTARY_PHASE = "phase", "commentary"
"""A field of an assistant message, and its value if the same turn continues after the message."""


def with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a message's reasoning, if it is a string, to every name that templates use.

    ``thinking`` is not added to a message with content and tool calls, as gpt-oss's template
    rejects such messages.
    """
    given = [message[name] for name in REASONING_NAMES if message.get(name)]
    if not given or not isinstance(given[0], str):
        return dict(message)
    is_refused = message.get("content") and message.get("tool_calls")
    names = REASONING_NAMES[:-1] if is_refused else REASONING_NAMES
    return {**message, **{name: message.get(name) or given[0] for name in names}}
