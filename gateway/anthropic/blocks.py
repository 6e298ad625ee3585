"""Converts model output to Anthropic content blocks: reasoning, text and tool calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cluster.core.checks import finite_or_text
from gateway.text.tool_formats.tool_calls import CallDelta, ParsedPiece

Event = dict[str, Any]
ShownThinking = Literal["all", "omitted", "none"]
"""Reasoning that a client receives: ``all``, ``omitted`` (blocks without text) or ``none``."""
_OWN_PREFIX, _PREFIX = "call_", "toolu_"


@dataclass(slots=True)
class _OpenBlock:
    """The block that is not complete yet."""

    kind: Literal["text", "thinking", "tool_use"]
    seal: Any = None
    """Hash object of the reasoning text so far; None for blocks of another kind."""


class BlockWriter:
    """Converts parsed pieces of the output into stream events.

    White space between reasoning and a tool call does not start a text block.
    """

    def __init__(self, thinking: ShownThinking) -> None:
        self._thinking = thinking
        self._open_block: _OpenBlock | None = None
        self._num_begun = 0
        self._space = ""

    def feed(self, parsed: ParsedPiece) -> list[Event]:
        """Return the events of a parsed piece."""
        events: list[Event] = []
        for part in parsed.ordered_parts():
            if isinstance(part, CallDelta):
                events += self._add_call(part)
            elif part.is_reasoning:
                events += self._add_reasoning(part.text)
            else:
                events += self._add_text(part.text)
        return events

    def end(self) -> list[Event]:
        """Return the events that end the open block."""
        block, self._open_block = self._open_block, None
        if block is None:
            return []
        index = {"index": self._num_begun - 1}
        stop: Event = {"type": "content_block_stop", **index}
        if block.kind != "thinking":
            return [stop]
        seal = {"type": "signature_delta", "signature": block.seal.hexdigest()}
        return [{"type": "content_block_delta", **index, "delta": seal}, stop]

    def _add_text(self, text: str) -> list[Event]:
        if self._open_block is None or self._open_block.kind != "text":
            text = self._space + text
            self._space = "" if text.strip() else text
            if self._space:
                return []
        events = self._begin("text", {"type": "text", "text": ""})
        return [*events, self._delta({"type": "text_delta", "text": text})]

    def _add_reasoning(self, text: str) -> list[Event]:
        if self._thinking == "none":
            return []
        block = {"type": "thinking", "thinking": "", "signature": ""}
        events = self._begin("thinking", block)
        assert self._open_block is not None, "no block is open"
        self._open_block.seal.update(text.encode())
        if self._thinking == "omitted":
            return events
        return [*events, self._delta({"type": "thinking_delta", "thinking": text})]

    def _add_call(self, call: CallDelta) -> list[Event]:
        events: list[Event] = []
        if call.name is not None:
            name = (call.call_id or "").replace(_OWN_PREFIX, _PREFIX, 1)
            block = {"type": "tool_use", "id": name, "name": call.name, "input": {}}
            events = self._begin("tool_use", block, is_new=True)
        if call.arguments:
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            events.append(self._delta(delta))
        return events

    def _begin(
        self, kind: Literal["text", "thinking", "tool_use"], block: Event, is_new: bool = False
    ) -> list[Event]:
        """Begin a block, unless one of the same kind is open and ``is_new`` is False."""
        if self._open_block is not None and self._open_block.kind == kind and not is_new:
            return []
        events = self.end()
        self._space = ""
        self._open_block = _OpenBlock(kind, hashlib.sha256() if kind == "thinking" else None)
        start = {"type": "content_block_start", "index": self._num_begun, "content_block": block}
        self._num_begun += 1
        return [*events, start]

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self._num_begun - 1, "delta": delta}


def collect_blocks(events: Iterable[Event]) -> list[Event]:
    """Build the content blocks from the events of a whole message.

    The input of an incomplete call is empty.
    """
    blocks: list[Event] = []
    inputs: dict[int, str] = {}
    for event in events:
        index = event["index"]
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        for name, value in event.get("delta", {}).items():
            if name == "partial_json":
                inputs[index] = inputs.get(index, "") + value
            elif name != "type":
                blocks[index][name] += value
    for index, text in inputs.items():
        blocks[index]["input"] = _input(text)
    return blocks


def _input(text: str) -> dict[str, Any]:
    """Return the object that a model has written, with values that JSON in UTF-8 can have."""
    try:
        value = json.loads(text, parse_float=finite_or_text, parse_constant=str)
        written = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
        value = json.loads(written.decode("utf-16", "replace"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
