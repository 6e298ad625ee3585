"""Known fields of Anthropic's protocol that are rejected by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.core.errors import UnsupportedParameterError
from gateway.core.field_checks import Neutral, refuse_unsupported

UNSUPPORTED: Neutral = {
    "container": (),
    "mcp_servers": ([],),
    "fallbacks": ([],),
    "inference_geo": (),
    "speed": ("standard",),
}
"""Unsupported fields, each with the values that have no effect; null never has an effect."""
_UNBUILT_TOOL: Neutral = {
    "allowed_callers": (["direct"], []),
    "input_examples": ([],),
}
"""Unsupported fields of ``tools``, each with the values that have no effect."""
_BETWEEN_TOOLS = "between_tools"
_KEEPING_EDITS = "clear_thinking_"
"""Prefix of edits that concern reasoning of earlier turns; the chat template handles it."""


def check_unsupported(data: Mapping[str, Any]) -> None:
    """Reject unsupported fields, unless their value has no effect.

    Raises:
        UnsupportedParameterError: a field is not supported; the error names it.
    """
    refuse_unsupported(data, UNSUPPORTED)
    for place, tool in enumerate(_objects(data.get("tools"))):
        path = f"tools[{place}]"
        kind = tool.get("type")
        if isinstance(kind, str) and kind != "custom":
            _refuse(f"{path}.type", kind, "only custom tools")
        refuse_unsupported(tool, _UNBUILT_TOOL, f"{path}.")
    thinking = data.get("thinking")
    if isinstance(thinking, Mapping) and thinking.get("type") == _BETWEEN_TOOLS:
        known = "enabled, disabled and adaptive"
        _refuse("thinking.type", _BETWEEN_TOOLS, known)
    management = data.get("context_management")
    edits = management.get("edits") if isinstance(management, Mapping) else None
    for place, edit in enumerate(_objects(edits)):
        kind = str(edit.get("type"))
        if not kind.startswith(_KEEPING_EDITS):
            path = f"context_management.edits[{place}].type"
            _refuse(path, kind, "only edits of thinking")


def _objects(value: object) -> Sequence[Mapping[str, Any]]:
    """Return the objects in a list; empty for other values, which the body types reject."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _refuse(path: str, kind: str, known: str) -> None:
    raise UnsupportedParameterError(f"{path} {kind[:64]!r} is not supported, {known} are", path)
