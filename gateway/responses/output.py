"""Build the output items of a choice and the matching stream events.

``OutputBuilder`` receives the parsed pieces of a choice in order and builds its items: reasoning,
messages and calls. The events that it returns describe these items to a streaming client.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.responses.items import Item, ItemIds, output_part, seal
from gateway.responses.tools import CustomInput, ToolName
from gateway.text.forms.tool_calls import CallDelta

Event = dict[str, Any]
"""One server-sent event without its ``sequence_number``."""
_COMPLETED, _INCOMPLETE, _IN_PROGRESS = "completed", "incomplete", "in_progress"


class OpenItem(ABC):
    """An item that is not complete yet.

    Args:
        item_id: id of the item.
        output_index: index of the item in ``output``.
    """

    kind = ""

    def __init__(self, item_id: str, output_index: int) -> None:
        self.item_id = item_id
        self._place = {"item_id": item_id, "output_index": output_index}
        self._output_index = output_index
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def open(self) -> list[Event]:
        return [self._told("added", _IN_PROGRESS)]

    def close(self, status: str) -> list[Event]:
        return [*self._ending(), self._told("done", status)]

    @abstractmethod
    def item(self, status: str) -> Item:
        """Return the item with the text so far."""

    @abstractmethod
    def _ending(self) -> list[Event]:
        """Return the events that precede ``response.output_item.done``."""

    def _told(self, what: str, status: str) -> Event:
        return {
            "type": f"response.output_item.{what}",
            "output_index": self._output_index,
            "item": self.item(status),
        }


class _OfOnePart(OpenItem):
    """An item with one part, its text."""

    event = ""
    """Prefix of the types of its text events."""

    def __init__(self, item_id: str, output_index: int) -> None:
        super().__init__(item_id, output_index)
        self._has_part = False

    def open(self) -> list[Event]:
        added = {"type": "response.content_part.added", **self._part_place}
        events = [*super().open(), {**added, "part": self._part()}]
        self._has_part = True
        return events

    @property
    def _content(self) -> list[Item]:
        return [self._part()] if self._has_part else []

    @property
    def _part_place(self) -> dict[str, Any]:
        return {**self._place, "content_index": 0}

    @abstractmethod
    def _part(self) -> Item:
        """Return the part with the text so far."""

    def _ending(self) -> list[Event]:
        done = {"type": "response.content_part.done", **self._part_place, "part": self._part()}
        return [{"type": f"{self.event}.done", **self._part_place, "text": self.text}, done]


class _Message(_OfOnePart):
    kind, event = "message", "response.output_text"

    def __init__(self, item_id: str, output_index: int) -> None:
        super().__init__(item_id, output_index)
        self._logprobs: list[Item] = []

    def add(self, text: str, logprobs: Sequence[Item]) -> list[Event]:
        self._texts.append(text)
        self._logprobs += logprobs
        delta = {"type": f"{self.event}.delta", **self._part_place, "delta": text}
        return [{**delta, "logprobs": list(logprobs)}]

    def item(self, status: str) -> Item:
        head = {"type": self.kind, "id": self.item_id, "status": status, "role": "assistant"}
        return {**head, "content": self._content}

    def _part(self) -> Item:
        return output_part(self.text, self._logprobs)

    def _ending(self) -> list[Event]:
        text_done, part_done = super()._ending()
        return [{**text_done, "logprobs": self._logprobs}, part_done]


class _Reasoning(_OfOnePart):
    kind, event = "reasoning", "response.reasoning_text"

    def __init__(self, item_id: str, output_index: int, is_sealed: bool) -> None:
        super().__init__(item_id, output_index)
        self._is_sealed = is_sealed

    def add(self, text: str) -> list[Event]:
        self._texts.append(text)
        return [{"type": f"{self.event}.delta", **self._part_place, "delta": text}]

    def item(self, status: str) -> Item:
        head = {"type": self.kind, "id": self.item_id, "status": status, "summary": []}
        found: Item = {**head, "content": self._content}
        return {**found, "encrypted_content": seal(self.text)} if self._is_sealed else found

    def _part(self) -> Item:
        return {"type": "reasoning_text", "text": self.text}


class _Call(OpenItem):
    kind, field, event = "function_call", "arguments", "response.function_call_arguments"

    def __init__(self, item_id: str, output_index: int, call_id: str, name: ToolName) -> None:
        super().__init__(item_id, output_index)
        self._head = {"call_id": call_id, "name": name.name}
        if name.namespace is not None:
            self._head["namespace"] = name.namespace

    def add(self, arguments: str) -> list[Event]:
        if not arguments:
            return []
        self._texts.append(arguments)
        return [{"type": f"{self.event}.delta", **self._place, "delta": arguments}]

    def item(self, status: str) -> Item:
        head = {"type": self.kind, "id": self.item_id, "status": status}
        return {**head, **self._head, self.field: self.text}

    def _ending(self) -> list[Event]:
        done = {"type": f"{self.event}.done", **self._place, "name": self._head["name"]}
        return [{**done, self.field: self.text}]


class _CustomCall(_Call):
    kind, field, event = "custom_tool_call", "input", "response.custom_tool_call_input"

    def __init__(self, item_id: str, output_index: int, call_id: str, name: ToolName) -> None:
        super().__init__(item_id, output_index, call_id, name)
        self._input = CustomInput()

    def add(self, arguments: str) -> list[Event]:
        return super().add(self._input.feed(arguments))


@dataclass(slots=True)
class _Held:
    """White space between items, which becomes part of an item if more text of its kind follows."""

    kind: str
    text: str = ""
    logprobs: tuple[Item, ...] = ()


class OutputBuilder:
    """Builds the output of one response.

    White space alone is not an item: models write it between the delimiters of their format.

    Args:
        ids: creates the ids of items.
        custom: names of custom tools as the model sees them.
        seals_reasoning: whether ``include`` has ``reasoning.encrypted_content``.
        namespaced: tools of namespaces, by name as the model sees them.
    """

    def __init__(
        self,
        ids: ItemIds,
        custom: frozenset[str],
        seals_reasoning: bool,
        namespaced: Mapping[str, ToolName] | None = None,
    ) -> None:
        self._ids = ids
        self._custom = custom
        self._namespaced = namespaced or {}
        self._seals_reasoning = seals_reasoning
        self._open: OpenItem | None = None
        self._held: _Held | None = None
        self._call_index = -1
        self.items: list[Item] = []
        """Complete items."""
        self.reasoning: list[str] = []
        """Texts of the complete reasoning items."""

    def add_text(self, text: str, logprobs: Sequence[Item] = ()) -> list[Event]:
        """Add message text and return its events."""
        item, events = self._take_over(_Message.kind, text, tuple(logprobs))
        if item is None:
            return events
        assert isinstance(item, _Message)
        held = self._release()
        return [*events, *item.add(held.text + text, [*held.logprobs, *logprobs])]

    def add_reasoning(self, text: str) -> list[Event]:
        """Add reasoning text and return its events."""
        item, events = self._take_over(_Reasoning.kind, text, ())
        if item is None:
            return events
        assert isinstance(item, _Reasoning)
        return [*events, *item.add(self._release().text + text)]

    def add_call(self, piece: CallDelta) -> list[Event]:
        """Add a piece of a tool call and return its events."""
        events: list[Event] = []
        if piece.index != self._call_index:
            self._call_index, name = piece.index, piece.name or ""
            kind = _CustomCall if name in self._custom else _Call
            index, item_id = self._next_index, self._ids.new(kind.kind)
            self._held = None
            named = self._namespaced.get(name) or ToolName(name)
            events += self._begin(kind(item_id, index, piece.call_id or "", named))
        assert isinstance(self._open, _Call), "the pieces of a call follow each other"
        return events + self._open.add(piece.arguments)

    def end(self, has_ended: bool, has_calls: bool) -> list[Event]:
        """End the choice and return the last events.

        Args:
            has_ended: whether the model ended the choice; if not, a last text item is incomplete.
            has_calls: whether the last call is complete.
        """
        events: list[Event] = []
        if self._open is None and not self.items:  # an output has at least an empty message
            held = self._release()
            message = self._new(_Message.kind)
            assert isinstance(message, _Message)
            events += self._begin(message)
            if held.text and held.kind == _Message.kind:
                events += message.add(held.text, held.logprobs)
        is_whole = has_calls if isinstance(self._open, _Call) else has_ended
        return events + self._end(_COMPLETED if is_whole else _INCOMPLETE)

    def output(self) -> list[Item]:
        """Return all items, including one that is not complete."""
        return self.items + ([self._open.item(_INCOMPLETE)] if self._open is not None else [])

    @property
    def _next_index(self) -> int:
        return len(self.items) + (self._open is not None)

    def _take_over(
        self, kind: str, text: str, logprobs: tuple[Item, ...]
    ) -> tuple[OpenItem | None, list[Event]]:
        """Return the open item of ``kind`` (None if ``text`` is held back) and its new events."""
        if self._held is None or self._held.kind != kind:
            self._held = _Held(kind)
        if self._open is not None and self._open.kind == kind:
            return self._open, []
        if not text.strip():
            self._held.text += text
            self._held.logprobs += logprobs
            return None, []
        item = self._new(kind)
        return item, self._begin(item)

    def _release(self) -> _Held:
        held, self._held = self._held or _Held(""), None
        return held

    def _new(self, kind: str) -> OpenItem:
        index, item_id = self._next_index, self._ids.new(kind)
        if kind == _Message.kind:
            return _Message(item_id, index)
        return _Reasoning(item_id, index, self._seals_reasoning)

    def _begin(self, item: OpenItem) -> list[Event]:
        """Close the open item and open ``item``."""
        events = self._end(_COMPLETED)
        self._open = item
        return events + item.open()

    def _end(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        ended, self._open = self._open, None
        self.items.append(ended.item(status))
        if isinstance(ended, _Reasoning):
            self.reasoning.append(ended.text)
        return ended.close(status)
