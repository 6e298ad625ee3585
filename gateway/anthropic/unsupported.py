"""Known fields of Anthropic's protocol that are refused by name."""

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
"""Fields that are not built, each with the values that change nothing; null never does."""
_UNBUILT_TOOL: Neutral = {
    "allowed_callers": (["direct"], []),
    "input_examples": ([],),
}
"""The same within ``tools``."""
_BETWEEN_TOOLS = "between_tools"
_KEEPING_EDITS = "clear_thinking_"
"""Edits that concern reasoning of earlier turns, which is for the chat template to decide."""


def check_unsupported(data: Mapping[str, Any]) -> None:
    """Refuse what is not built, unless its value changes nothing.

    Raises:
        UnsupportedParameterError: with the field's name.
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
    """The objects in a list; empty for anything else, which the types of bodies refuse."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _refuse(path: str, kind: str, known: str) -> None:
    raise UnsupportedParameterError(f"{path} {kind[:64]!r} is not supported, {known} are", path)
