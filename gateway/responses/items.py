"""Converts the items of a body to the format in which they are returned and stored.

An item is a JSON object with ``type`` and ``id``: a message, a call, the output of a call, or
reasoning. The id of an item contains the id of its response, so that ``item_reference`` finds it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.field_checks import require
from gateway.responses.schema import InputItem, InputPart

Item = dict[str, Any]
"""One item as returned to clients."""
INSTRUCTION_ROLES = frozenset({"system", "developer"})
"""Roles of messages with instructions; both have the same effect."""
ROLES = ("user", "assistant", *sorted(INSTRUCTION_ROLES))
PHASES = ("commentary", "final_answer")
CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
"""Types of calls, with the field that contains the input of the tool."""
OUTPUTS = {
    "function_call_output": "function_call",
    "custom_tool_call_output": "custom_tool_call",
}
"""Maps each type of call output to the type of its call."""
PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
_MAX_ID_CHARS = 256
_ID = re.compile(rf"(?:{'|'.join(PREFIXES.values())})_([0-9a-f]{{32}})[0-9a-f]{{6}}")
_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
_INPUT_PARTS = ("input_image", "input_file", "input_audio", "input_video")
_ENCODED_PREFIX = "expertmesh.1."
"""Prefix of ``encrypted_content``, which is not secret: clients receive the same text in
``content``, and some clients send only ``encrypted_content`` back."""


@dataclass(slots=True)
class ItemIdGenerator:
    """Creates the ids of a response's items."""

    response_id: str
    _number: int = field(default=0, init=False)

    def new(self, kind: str) -> str:
        """Create an id: a prefix (``msg_``), 32 digits of the response, 6 digits of the item."""
        self._number += 1
        digits = self.response_id.partition("_")[2]
        return f"{PREFIXES[kind]}_{digits}{self._number:06x}"


def response_id_of(item_id: str) -> str | None:
    """Return the id of the response that contains an item; None for ids of other servers."""
    match = _ID.fullmatch(item_id)
    return f"resp_{match[1]}" if match else None


def read_item(input_item: InputItem, path: str, ids: ItemIdGenerator) -> Item:
    """Check an item of a body and return it with an id. Raises ``RequestError``."""
    kind = input_item.type or "message"
    if kind not in PREFIXES:
        raise UnsupportedParameterError(
            f"{path}.type: items of type {kind[:64]!r} are not supported", f"{path}.type"
        )
    _check_id(input_item.id, path)
    head: Item = {"type": kind, "id": input_item.id or ids.new(kind)}
    if kind == "message":
        return {**head, "status": "completed", **_message(input_item, path)}
    if kind == "reasoning":
        return {**head, **_reasoning(input_item, path)}
    call_id = _require_field(input_item.call_id, f"{path}.call_id", kind)
    require(0 < len(call_id) <= _MAX_ID_CHARS, f"{path}.call_id", "must have 1 to 256 characters")
    head |= {"status": "completed", "call_id": call_id}
    if kind in OUTPUTS:
        if input_item.output is None:
            _require_field(None, f"{path}.output", kind)
        return {**head, "output": _text(input_item.output, f"{path}.output")}
    head["name"] = _require_field(input_item.name, f"{path}.name", kind)
    if input_item.namespace is not None:
        require(bool(input_item.namespace), f"{path}.namespace", "must not be empty")
        head["namespace"] = input_item.namespace
    if input_item.status == "incomplete":
        head["status"] = input_item.status
    field = CALLS[kind]
    return {**head, field: _require_field(getattr(input_item, field), f"{path}.{field}", kind)}


def text_of(item: Item) -> str:
    """Return the text of a message or of a reasoning item."""
    parts: Sequence[Item] = item.get("content") or ()
    return "\n".join(part["text"] for part in parts)


def encode_reasoning(text: str) -> str:
    """Return the ``encrypted_content`` of reasoning text."""
    return _ENCODED_PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


def _decode_reasoning(encoded: str, path: str) -> str:
    name = f"{path}.encrypted_content"
    require(encoded.startswith(_ENCODED_PREFIX), name, "must be text that this server returned")
    try:
        raw = base64.b64decode(encoded.removeprefix(_ENCODED_PREFIX), altchars=b"-_", validate=True)
        return raw.decode()
    except (binascii.Error, ValueError) as err:
        raise RequestError(f"{name} is damaged", name) from err


def _message(input_item: InputItem, path: str) -> Item:
    role = _require_field(input_item.role, f"{path}.role", "message")
    rule = f"({role[:32]!r}) must be one of {', '.join(ROLES)}"
    require(role in ROLES, f"{path}.role", rule)
    phase = input_item.phase
    rule = f"({str(phase)[:32]!r}) must be one of {', '.join(PHASES)}"
    require(phase is None or phase in PHASES, f"{path}.phase", rule)
    if input_item.content is None:
        _require_field(None, f"{path}.content", "message")
    text = _text(input_item.content, f"{path}.content", role)
    part: Item = {"type": "input_text", "text": text}
    if role == "assistant":
        part = output_part(text)
    phase_field = {} if phase is None or role != "assistant" else {"phase": phase}
    return {"role": role, "content": [part], **phase_field}


def output_part(text: str, logprobs: Sequence[Item] = ()) -> Item:
    """Return the content part of an assistant message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _reasoning(input_item: InputItem, path: str) -> Item:
    """Read reasoning text from ``content``, else ``encrypted_content``, else ``summary``."""
    summary = [
        _part_text(part, f"{path}.summary", "reasoning") for part in input_item.summary or ()
    ]
    if input_item.content:
        text = _text(input_item.content, f"{path}.content", "reasoning")
    elif input_item.encrypted_content:
        text = _decode_reasoning(input_item.encrypted_content, path)
    else:
        text = "\n".join(summary)
    item: Item = {
        "summary": [{"type": "summary_text", "text": one} for one in summary],
        "content": [{"type": "reasoning_text", "text": text}],
    }
    if input_item.encrypted_content:
        item["encrypted_content"] = input_item.encrypted_content
    return item


def _text(content: str | Sequence[InputPart] | None, path: str, role: str = "") -> str:
    """Return a content as one text; its parts are joined by newlines, as in chat completions."""
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, path, role) for part in content or ())


def _part_text(part: InputPart, path: str, role: str) -> str:
    """Return a part's text; ``role`` is a message's role, ``reasoning`` or empty (call outputs)."""
    if part.type in _INPUT_PARTS:
        raise UnsupportedParameterError(
            f"{path}: parts of type {part.type} are not supported, only text", path
        )
    allowed = {"reasoning": {"reasoning_text", "summary_text"}, "assistant": {"refusal"}}
    if part.type not in _TEXT_PARTS | allowed.get(role, set()):
        raise UnsupportedParameterError(
            f"{path}: parts of type {part.type[:32]!r} are not supported here", path
        )
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        name = "refusal" if part.type == "refusal" else "text"
        raise RequestError(f"{path}: a part of type {part.type} needs {name}", path)
    return text


def _check_id(item_id: str | None, path: str) -> None:
    fits = item_id is None or 0 < len(item_id) <= _MAX_ID_CHARS
    require(fits, f"{path}.id", f"must have 1 to {_MAX_ID_CHARS} characters")


def _require_field(value: str | None, path: str, kind: str) -> str:
    if value is None:
        message = f"{path} is required for items of type {kind}"
        raise RequestError(message, path, "missing_required_parameter")
    return value
