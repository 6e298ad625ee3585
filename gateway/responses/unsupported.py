"""Rejects known fields of this protocol and of similar protocols that are not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.core.errors import UnsupportedParameterError
from gateway.core.field_checks import Neutral, refuse_unsupported
from gateway.http.unsupported import BEAM_SEARCH_FIELDS, UNSUPPORTED_STRUCTURED
from gateway.http.unsupported import UNSUPPORTED as UNBUILT_ELSEWHERE

UNSUPPORTED: Neutral = {
    **UNBUILT_ELSEWHERE["chat"],
    **BEAM_SEARCH_FIELDS,
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "access_programs": (),
    "truncation": ("disabled",),
    "generate": (True,),
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "echo": (False,),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "request_id": (),
}
"""Unsupported fields of a body, each with the values that have no effect."""
_NESTED_FIELDS: Mapping[str, Neutral] = {
    "structured_outputs": UNSUPPORTED_STRUCTURED,
    "reasoning": {"context": ("auto",), "mode": ("standard",)},
    "stream_options": {"include_obfuscation": (False,)},
    "prompt_cache_options": {"prewarm": (False,)},
}
"""Unsupported fields of the objects in a body, by the name of the object."""
_TOOL_FIELDS: Neutral = {
    "async": (False,),
    "defer_loading": (False,),
    "allowed_callers": (["direct"], []),
}
RENAMED_FIELDS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of chat completions, each with the field of Responses that replaces it."""


def check_unsupported(data: Mapping[str, Any]) -> None:
    """Reject unsupported fields, unless their value has no effect.

    Raises:
        UnsupportedParameterError: a field is not supported; the error names it.
    """
    for name, now in RENAMED_FIELDS.items():
        if data.get(name) is not None:
            raise UnsupportedParameterError(f"{name} is not supported: use {now}", name)
    refuse_unsupported(data, UNSUPPORTED)
    for name, unbuilt in _NESTED_FIELDS.items():
        inner = data.get(name)
        if isinstance(inner, dict):
            refuse_unsupported(inner, unbuilt, f"{name}.")
    _check_tools(data.get("tools"), "tools")


def _check_tools(tools: object, path: str) -> None:
    """Reject unsupported fields of tools, and of the tools in namespaces, which do not nest."""
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict):
            refuse_unsupported(tool, _TOOL_FIELDS, f"{path}[{index}].")
            if path == "tools":
                _check_tools(tool.get("tools"), f"{path}[{index}].tools")
