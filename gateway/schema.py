"""HTTP bodies: JSON to typed fields.

Types are strict (``"5"`` is not a number) and unknown fields are ignored; what the values may be is
checked later, once for both codecs, in ``gateway/field_checks.py``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from cluster.errors import RequestError, UnsupportedParameterError
from gateway.field_checks import (
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_MESSAGES,
    check_length,
    check_messages,
    is_deeper,
)
from gateway.tools import MAX_TOOLS

STRICT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
"""Of all bodies."""
_MESSAGE = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""JSON knows one kind of number: 5.0 is 5."""
Item = TypeVar("Item")


class _FirstError(FailFast):
    """``FailFast`` that can be in a union of types."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


Items = Annotated[list[Item], _FirstError()]
"""A list of which the first wrong item ends the check: a body has room for millions."""


class Part(BaseModel):
    """One part of a message's content."""

    model_config = STRICT
    type: str
    text: str | None = None


class CalledFunction(BaseModel):
    """Which function was called, and with what: JSON text."""

    model_config = STRICT
    name: str
    arguments: str = "{}"


class MessageCall(BaseModel):
    """A call that an assistant's message made."""

    model_config = STRICT
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One message; fields that are not named here go to the chat template as they are."""

    model_config = _MESSAGE
    role: str
    content: str | Items[Part] | None = None
    name: str | None = None
    tool_calls: Items[MessageCall] | None = None
    tool_call_id: str | None = None


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = STRICT
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaBody(BaseModel):
    """``response_format.json_schema``."""

    model_config = STRICT
    schema_: dict[str, Any] | str | None = Field(default=None, alias="schema")


class FunctionBody(BaseModel):
    """A function that may be called; ``strict`` is accepted: arguments always follow the schema."""

    model_config = STRICT
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(BaseModel):
    """One entry of ``tools``."""

    model_config = STRICT
    type: Literal["function"]
    function: FunctionBody


class FunctionName(BaseModel):
    """``tool_choice.function``."""

    model_config = STRICT
    name: str


class ToolChoiceBody(BaseModel):
    """A ``tool_choice`` that names the function."""

    model_config = STRICT
    type: Literal["function"]
    function: FunctionName


class ResponseFormatBody(BaseModel):
    """``response_format``."""

    model_config = STRICT
    type: str
    json_schema: JsonSchemaBody | None = None


class StructuredOutputsBody(BaseModel):
    """``structured_outputs``, with the names of vLLM."""

    model_config = STRICT
    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerateBody(BaseModel):
    """Fields that completions and chat share."""

    model_config = STRICT
    model: str | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    min_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    seed: Whole | None = None
    n: Whole | None = None
    stop: str | Items[str] | None = None
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Whole | None = None
    cache_salt: str | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: Whole | None = None
    logprob_token_ids: Items[int] | None = None
    allowed_token_ids: Items[int] | None = None
    bad_words: Items[str] | None = None
    response_format: ResponseFormatBody | None = None
    structured_outputs: StructuredOutputsBody | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: str | None = None
    request_id: str | None = None


class CompletionBody(GenerateBody):
    """``POST /v1/completions``."""

    prompt: str | Items[int] | Items[str] | Items[Items[int]]
    logprobs: Whole | None = None
    best_of: Whole | None = None
    echo: bool | None = None


class ChatBody(GenerateBody):
    """``POST /v1/chat/completions``."""

    messages: Items[Message]
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Items[ToolBody] | None = None
    tool_choice: str | ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None


class TokenizeBody(BaseModel):
    """``POST /tokenize``."""

    model_config = STRICT
    model: str | None = None
    prompt: str | None = None
    messages: Items[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    tools: Items[ToolBody] | None = None


class DetokenizeBody(BaseModel):
    """``POST /detokenize``."""

    model_config = STRICT
    model: str | None = None
    tokens: Items[int]


Body = TypeVar("Body", bound=BaseModel)

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

_PROMPT_SHAPE = "must be a string, a list of strings, a list of token ids or a list of such lists"
_SHAPES = {
    "prompt": _PROMPT_SHAPE,
    "stop": "must be a string or a list of strings",
    "input": _PROMPT_SHAPE,
    "queries": _PROMPT_SHAPE,
    "documents": _PROMPT_SHAPE,
    "text_1": _PROMPT_SHAPE,
    "text_2": _PROMPT_SHAPE,
    "attention_mask": "must be a list of 0 and 1, or a list of such lists",
    "content": "must be a string or a list of text parts",
    "tool_choice": "must be none, auto, required or name a function",
    "schema": "must be a JSON schema: an object, or its JSON text",
    "json": "must be a JSON schema: an object, or its JSON text",
}
"""What a field with several types may be."""
_MOST_ENTRIES = {
    "tools": MAX_TOOLS,
    "logit_bias": MAX_LOGIT_BIAS_ENTRIES,
}
"""Lengths that are checked before the entries are."""


class _NoCollections(contextlib.AbstractContextManager[None]):
    """No garbage collections, each of which would go through all that was parsed so far.

    Bodies are parsed in several threads: the last one to end turns collections on again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._were_on = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._were_on = gc.isenabled()
                gc.disable()
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside and self._were_on:
                gc.enable()


_NO_COLLECTIONS = _NoCollections()


def parse_json(raw: bytes, max_depth: int) -> dict[str, Any]:
    """The object in a body.

    Raises:
        RequestError: not JSON, not an object, or nested too deeply.
    """
    try:
        text = raw.decode(json.detect_encoding(raw))
        with _NO_COLLECTIONS:
            data = json.loads(text)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(data, ensure_ascii=False).encode()  # half a pair is not text
    except RecursionError as err:
        raise _too_deep(max_depth) from err
    except ValueError as err:  # also undecodable bytes, lone surrogates, integers without end
        reason = getattr(err, "msg", "not readable")
        raise RequestError(f"the body is not valid JSON: {reason}", code="json_invalid") from err
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object", code="json_invalid")
    if is_deeper(data, max_depth):
        raise _too_deep(max_depth)
    return data


def parse_body(kind: type[Body], data: Mapping[str, Any]) -> Body:
    """The typed fields of a body. Raises ``RequestError`` for the first that is wrong."""
    for name, most in _MOST_ENTRIES.items():
        value = data.get(name)
        if name in kind.model_fields and isinstance(value, list | dict):
            check_length(name, len(value), most)
    messages = data.get("messages")
    if "messages" in kind.model_fields and isinstance(messages, list):
        check_messages(len(messages), _num_parts(messages[: MAX_MESSAGES + 1]))
    try:
        return kind.model_validate(data)
    except ValidationError as err:
        raise _describe(err) from err


def _num_parts(messages: Sequence[object]) -> int:
    """Fields of all messages, parts of their contents and calls that they made."""
    named = [message for message in messages if isinstance(message, dict)]
    inner = [message.get(name) for message in named for name in ("content", "tool_calls")]
    return sum(map(len, named)) + sum(len(one) for one in inner if isinstance(one, list))


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


def _too_deep(max_depth: int) -> RequestError:
    return RequestError(
        f"the body is nested too deeply: at most {max_depth} levels", code="json_invalid"
    )


def _describe(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    path = _field_path(first["loc"])
    name = path.rpartition(".")[2].partition("[")[0]
    if first["type"] == "missing":
        return RequestError(f"{path} is required", path, "missing_required_parameter")
    if name in _SHAPES:
        return RequestError(f"{path} {_SHAPES[name]}", path)
    rule = first["msg"].removeprefix("Input ").removeprefix("should ")
    return RequestError(f"{path} must {rule}" if rule != first["msg"] else f"{path}: {rule}", path)


def _field_path(location: Sequence[str | int]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            path += f".{part}" if path else part
        else:
            break  # the name of one type of several
    return path
