"""Rejects known fields of Anthropic's protocol that are not supported."""

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
_UNSUPPORTED_TOOL: Neutral = {
    "allowed_callers": (["direct"], []),
    "input_examples": ([],),
}
"""Unsupported fields of ``tools``, each with the values that have no effect."""
_BETWEEN_TOOLS = "between_tools"
_THINKING_EDITS = "clear_thinking_"
"""Prefix of edits that remove earlier reasoning. They are accepted: chat templates remove it."""


def check_unsupported(data: Mapping[str, Any]) -> None:
    """Reject unsupported fields, unless their value has no effect.

    Raises:
        UnsupportedParameterError: a field is not supported; the error names it.
    """
    refuse_unsupported(data, UNSUPPORTED)
    for index, tool in _objects_in(data.get("tools")):
        path = f"tools[{index}]"
        kind = tool.get("type")
        if isinstance(kind, str) and kind != "custom":
            _reject(f"{path}.type", kind, "only custom tools")
        refuse_unsupported(tool, _UNSUPPORTED_TOOL, f"{path}.")
    thinking = data.get("thinking")
    if isinstance(thinking, Mapping) and thinking.get("type") == _BETWEEN_TOOLS:
        supported = "enabled, disabled and adaptive"
        _reject("thinking.type", _BETWEEN_TOOLS, supported)
    management = data.get("context_management")
    edits = management.get("edits") if isinstance(management, Mapping) else None
    for index, edit in _objects_in(edits):
        kind = str(edit.get("type"))
        if not kind.startswith(_THINKING_EDITS):
            path = f"context_management.edits[{index}].type"
            _reject(path, kind, "only edits of thinking")


def _objects_in(value: object) -> Sequence[tuple[int, Mapping[str, Any]]]:
    """Return the objects in a list with their indexes; empty for a value that is not a list."""
    entries = enumerate(value) if isinstance(value, list) else ()
    return [(index, one) for index, one in entries if isinstance(one, Mapping)]


def _reject(path: str, kind: str, supported: str) -> None:
    raise UnsupportedParameterError(f"{path} {kind[:64]!r} is not supported, {supported} are", path)
