"""Known fields of other servers that are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from cluster.core.errors import UnsupportedParameterError


def refused_fields(kind: Literal["completion", "chat", "tokenize"]) -> frozenset[str]:
    """Known fields that are refused by name unless their value changes nothing."""
    return frozenset(_UNBUILT | _UNBUILT_BY_KIND[kind])


def check_unbuilt(data: Mapping[str, Any], kind: Literal["completion", "chat", "tokenize"]) -> None:
    """Refuse known fields that are not built, unless their value changes nothing.

    Raises:
        UnsupportedParameterError: with the field's name.
    """
    for name, is_neutral in (_UNBUILT | _UNBUILT_BY_KIND[kind]).items():
        if data.get(name) is not None and not is_neutral(data[name], data):
            raise UnsupportedParameterError(f"{name} is not supported", name)
    structured = data.get("structured_outputs")
    inner = structured if isinstance(structured, dict) else {}
    for name in _UNBUILT_STRUCTURED:
        if inner.get(name) not in (None, False):
            path = f"structured_outputs.{name}"
            raise UnsupportedParameterError(f"{path} is not supported", path)
    misplaced = {"chat": "echo", "completion": "chat_template"}.get(kind)
    if misplaced is not None and data.get(misplaced):
        raise UnsupportedParameterError(f"{misplaced} is not supported for {kind}", misplaced)


_IsNeutral = Callable[[Any, Mapping[str, Any]], bool]


def _never(value: Any, data: Mapping[str, Any]) -> bool:
    return False


def _only(*neutral: Any) -> Callable[[Any, Mapping[str, Any]], bool]:
    def is_neutral(value: Any, data: Mapping[str, Any]) -> bool:
        return any(type(value) is type(one) and value == one for one in neutral)

    return is_neutral


def _best_of(value: Any, data: Mapping[str, Any]) -> bool:
    return bool(value == (data.get("n") or 1)) and not isinstance(value, bool)


def _tools(value: Any, data: Mapping[str, Any]) -> bool:
    return value == [] or data.get("tool_choice") == "none"


_UNBUILT: dict[str, _IsNeutral] = {
    "guided_json": _never,
    "guided_regex": _never,
    "guided_choice": _never,
    "guided_grammar": _never,
    "guided_json_object": _only(False),
    "guided_whitespace_pattern": _never,
    "guided_decoding_backend": _never,
    "structural_tag": _never,
    "functions": _only([]),
    "function_call": _only("none"),
    "use_beam_search": _only(False),
    "length_penalty": _only(1, 1.0),
    "early_stopping": _only(False),
    "spaces_between_special_tokens": _only(True),
    "logits_processors": _only([]),
    "suffix": _only(""),
    "prompt_embeds": _never,
    "audio": _never,
    "modalities": _only(["text"]),
    "prediction": _never,
    "web_search_options": _never,
    "documents": _only([]),
    "mm_processor_kwargs": _only({}),
    "kv_transfer_params": _only({}),
}
"""Known fields that are not built, each with the test for a value that changes nothing."""
_NO_TRUNCATION: dict[str, _IsNeutral] = {
    "truncate_prompt_tokens": _never,
    "truncation_side": _never,
}
_UNBUILT_BY_KIND: dict[str, dict[str, _IsNeutral]] = {
    "completion": {"tools": _tools, "tool_choice": _only("none", "auto")},
    "chat": {"best_of": _best_of},
    "tokenize": {"best_of": _best_of, **_NO_TRUNCATION},
}
"""The same for one route each."""
_UNBUILT_STRUCTURED = (
    "structural_tag",
    "whitespace_pattern",
    "disable_any_whitespace",
    "disable_additional_properties",
)
"""The same within ``structured_outputs``; null and false change nothing."""
