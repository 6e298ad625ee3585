"""Rejects fields that other servers support and this server does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cluster.core.errors import UnsupportedParameterError
from gateway.core.field_checks import Neutral, refuse_unsupported

EndpointKind = Literal["completion", "chat", "tokenize", "pooling"]

_GENERATE: Neutral = {
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json_object": (False,),
    "guided_whitespace_pattern": (),
    "guided_decoding_backend": (),
    "structural_tag": (),
    "functions": ([],),
    "function_call": ("none",),
    "spaces_between_special_tokens": (True,),
    "logits_processors": ([],),
    "suffix": ("",),
    "prompt_embeds": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "kv_transfer_params": ({},),
}
BEAM_SEARCH_FIELDS: Neutral = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
}
"""Fields for beam search, which only completions and chat support."""
_TRUNCATION: Neutral = {"truncate_prompt_tokens": (), "truncation_side": ()}
UNSUPPORTED: Mapping[EndpointKind, Neutral] = {
    "completion": {**_GENERATE, "tools": ([],), "tool_choice": ("none", "auto")},
    "chat": {**_GENERATE, "best_of": ()},
    "tokenize": {**_GENERATE, **BEAM_SEARCH_FIELDS, "best_of": (), **_TRUNCATION},
    "pooling": {
        "dimensions": (),
        "normalize": (False,),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "use_activation": (True,),
        "activation": (True,),
        "messages": (),
        "instruction": (),
        **_TRUNCATION,
        "prompt_embeds": (),
        "mm_processor_kwargs": ({},),
    },
}
"""Unsupported fields, each with the values that have no effect; null never has an effect."""
UNSUPPORTED_STRUCTURED: Neutral = {
    "structural_tag": (False,),
    "whitespace_pattern": (False,),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
}
"""Unsupported fields of ``structured_outputs``, each with the values that have no effect."""
_MISPLACED: Mapping[EndpointKind, str] = {"chat": "echo", "completion": "chat_template"}


def check_unsupported(data: Mapping[str, Any], endpoint: EndpointKind) -> None:
    """Reject known fields that are not supported, unless their value has no effect.

    Raises:
        UnsupportedParameterError: a field is not supported; the error names it.
    """
    unbuilt = dict(UNSUPPORTED[endpoint])
    if data.get("tool_choice") == "none":
        unbuilt.pop("tools", None)
    if "best_of" in unbuilt:
        unbuilt["best_of"] = (data.get("n") or 1,)
    refuse_unsupported(data, unbuilt)
    structured = data.get("structured_outputs")
    if endpoint != "pooling" and isinstance(structured, dict):
        refuse_unsupported(structured, UNSUPPORTED_STRUCTURED, "structured_outputs.")
    misplaced = _MISPLACED.get(endpoint)
    if misplaced is not None and data.get(misplaced):
        raise UnsupportedParameterError(f"{misplaced} is not supported for {endpoint}", misplaced)
