"""Converts the items of a conversation to messages for chat templates.

Consecutive items of the assistant are merged into few messages, as templates expect: reasoning,
then text, then calls form one message. Instructions at the beginning form one ``system`` message,
since many templates accept only one and do not know the role ``developer``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.core.errors import RequestError
from gateway.core.field_checks import require
from gateway.core.messages import COMMENTARY_PHASE, PHASE, REASONING_NAMES
from gateway.core.tool_use import CallArguments
from gateway.http.json_output import dump_json
from gateway.responses.items import CALLS, INSTRUCTION_ROLES, OUTPUTS, Item, text_of
from gateway.responses.tools import ToolName
from gateway.text.tool_formats.tools import json_object

_REASONING = REASONING_NAMES[0]
_JOINED = {"content": "\n\n", _REASONING: "\n"}
"""Separators of message fields that are lists of texts until ``finish`` joins them."""
_MESSAGES = re.compile(r"\bmessages(?:\[([0-9]{1,9})\](?:\.tool_calls)?)?")


@dataclass(slots=True)
class ConversationBuilder:
    """Builds messages, and records which field of the body each comes from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    """Messages before ``finish`` joins their texts."""
    paths: list[str] = field(default_factory=list)
    """Body field of each message, such as ``instructions`` or ``input[3]``."""
    _calls: dict[str, str] = field(default_factory=dict)
    """Types of calls by ``call_id``."""
    _is_turn_open: bool = False
    """Whether the next assistant item may extend the last message."""

    def add_instructions(self, text: str, path: str) -> None:
        """Add instructions. All instructions at the beginning form one message."""
        if len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0]["content"].append(text)
        else:
            self._add({"role": "system", "content": [text]}, path)

    def finish(self) -> tuple[dict[str, Any], ...]:
        """Join the texts of each message and return all messages."""
        for message in self.messages:
            for name, separator in _JOINED.items():
                if isinstance(pieces := message.get(name), list):
                    message[name] = separator.join(pieces)
        return tuple(self.messages)

    def add(self, item: Item, path: str) -> None:
        """Add an item. Raises ``RequestError`` if it does not fit the previous items."""
        kind = item["type"]
        if kind == "message":
            self._add_message(item, path)
        elif kind == "reasoning":
            self._add_reasoning(text_of(item), path)
        elif kind in CALLS:
            if item.get("status") != "incomplete":  # a cut-off call was not executed
                self._add_call(item, path)
        else:
            call_id = item["call_id"]
            is_known = self._calls.get(call_id) == OUTPUTS[kind]
            rule = f"({call_id[:64]!r}) must be the call_id of an earlier {OUTPUTS[kind]}"
            require(is_known, f"{path}.call_id", rule)
            output = {"role": "tool", "tool_call_id": call_id, "content": item["output"]}
            self._add(output, path)

    def _add(self, message: dict[str, Any], path: str) -> dict[str, Any]:
        self.messages.append(message)
        self.paths.append(path)
        self._is_turn_open = message["role"] == "assistant"
        return message

    def _add_message(self, item: Item, path: str) -> None:
        role, text = item["role"], text_of(item)
        if role in INSTRUCTION_ROLES:
            self.add_instructions(text, path)
        elif role == "user":
            self._add({"role": "user", "content": text}, path)
        else:
            last = self._assistant_message(
                path, lambda last: not (last["content"] or last.get("tool_calls"))
            )
            last["content"] = text
            if PHASE in item:
                last[PHASE] = item[PHASE]

    def _add_reasoning(self, text: str, path: str) -> None:
        last = self._assistant_message(
            path, lambda last: not (last["content"] or last.get("tool_calls"))
        )
        pieces = last.setdefault(_REASONING, [])
        if pieces == [""]:
            pieces.clear()
        pieces.append(text)

    def _add_call(self, item: Item, path: str) -> None:
        field = CALLS[item["type"]]
        arguments = item[field]
        if item["type"] == "custom_tool_call":
            value, arguments = {field: arguments}, dump_json({field: arguments}).decode()
        else:
            value = json_object(arguments, f"{path}.{field}")
        name = ToolName(item["name"], item.get("namespace")).for_model
        function = {"name": name, "arguments": CallArguments(value, arguments)}
        call = {"id": item["call_id"], "type": "function", "function": function}
        last = self._assistant_message(path, lambda last: True)
        last.setdefault("tool_calls", []).append(call)
        self._calls[item["call_id"]] = item["type"]

    def _assistant_message(
        self, path: str, can_take: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        """Return the assistant message for the next item: the last one if it fits, or a new one."""
        last = self.messages[-1] if self._is_turn_open else None
        if last is not None and can_take(last):
            return last
        if last is not None and last["content"] and not last.get("tool_calls"):
            last.setdefault(PHASE, COMMENTARY_PHASE)  # more items of its turn follow
        return self._add({"role": "assistant", "content": ""}, path)


@contextmanager
def rename_error_fields(paths: Sequence[str]) -> Iterator[None]:
    """Replace message indices in errors by the names of the body fields.

    Args:
        paths: ``ConversationBuilder.paths``.
    """
    try:
        yield
    except RequestError as err:
        if err.param is None or not _MESSAGES.match(err.param):
            raise

        def name(match: re.Match[str]) -> str:
            if match[1] is None:
                return "input"
            index = int(match[1])
            return paths[index] if index < len(paths) else match[0]  # a client's text in an error

        message, param = _MESSAGES.sub(name, err.message), _MESSAGES.sub(name, err.param)
        raise type(err)(message, param, err.code) from err
