"""Builds the output items of a choice, and the stream events that describe them.

``OutputBuilder`` receives the parsed pieces of a choice in order, and builds its items: reasoning,
messages and calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.responses.items import Item, ItemIdGenerator, encode_reasoning, output_part
from gateway.responses.tools import CustomInputReader, ToolName
from gateway.text.tool_formats.tool_calls import CallDelta

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
        self._location = {"item_id": item_id, "output_index": output_index}
        self._output_index = output_index
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def open(self) -> list[Event]:
        return [self._item_event("added", _IN_PROGRESS)]

    def close(self, status: str) -> list[Event]:
        return [*self._ending(), self._item_event("done", status)]

    @abstractmethod
    def item(self, status: str) -> Item:
        """Return the item with the text so far."""

    @abstractmethod
    def _ending(self) -> list[Event]:
        """Return the events that precede ``response.output_item.done``."""

    def _item_event(self, what: str, status: str) -> Event:
        return {
            "type": f"response.output_item.{what}",
            "output_index": self._output_index,
            "item": self.item(status),
        }


class _SinglePartItem(OpenItem):
    """An item with one part, its text."""

    event = ""
    """Prefix of the types of its text events."""

    def __init__(self, item_id: str, output_index: int) -> None:
        super().__init__(item_id, output_index)
        self._has_part = False

    def open(self) -> list[Event]:
        added = {"type": "response.content_part.added", **self._part_location}
        events = [*super().open(), {**added, "part": self._part()}]
        self._has_part = True
        return events

    @property
    def _content(self) -> list[Item]:
        return [self._part()] if self._has_part else []

    @property
    def _part_location(self) -> dict[str, Any]:
        return {**self._location, "content_index": 0}

    @abstractmethod
    def _part(self) -> Item:
        """Return the part with the text so far."""

    def _ending(self) -> list[Event]:
        done = {"type": "response.content_part.done", **self._part_location, "part": self._part()}
        return [{"type": f"{self.event}.done", **self._part_location, "text": self.text}, done]


class _MessageItem(_SinglePartItem):
    kind, event = "message", "response.output_text"

    def __init__(self, item_id: str, output_index: int) -> None:
        super().__init__(item_id, output_index)
        self._logprobs: list[Item] = []

    def add(self, text: str, logprobs: Sequence[Item]) -> list[Event]:
        self._texts.append(text)
        self._logprobs += logprobs
        delta = {"type": f"{self.event}.delta", **self._part_location, "delta": text}
        return [{**delta, "logprobs": list(logprobs)}]

    def item(self, status: str) -> Item:
        head = {"type": self.kind, "id": self.item_id, "status": status, "role": "assistant"}
        return {**head, "content": self._content}

    def _part(self) -> Item:
        return output_part(self.text, self._logprobs)

    def _ending(self) -> list[Event]:
        text_done, part_done = super()._ending()
        return [{**text_done, "logprobs": self._logprobs}, part_done]


class _ReasoningItem(_SinglePartItem):
    kind, event = "reasoning", "response.reasoning_text"

    def __init__(self, item_id: str, output_index: int, is_encoded: bool) -> None:
        super().__init__(item_id, output_index)
        self._is_encoded = is_encoded

    def add(self, text: str) -> list[Event]:
        self._texts.append(text)
        return [{"type": f"{self.event}.delta", **self._part_location, "delta": text}]

    def item(self, status: str) -> Item:
        head = {"type": self.kind, "id": self.item_id, "status": status, "summary": []}
        item: Item = {**head, "content": self._content}
        return (
            {**item, "encrypted_content": encode_reasoning(self.text)} if self._is_encoded else item
        )

    def _part(self) -> Item:
        return {"type": "reasoning_text", "text": self.text}


class _CallItem(OpenItem):
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
        return [{"type": f"{self.event}.delta", **self._location, "delta": arguments}]

    def item(self, status: str) -> Item:
        head = {"type": self.kind, "id": self.item_id, "status": status}
        return {**head, **self._head, self.field: self.text}

    def _ending(self) -> list[Event]:
        done = {"type": f"{self.event}.done", **self._location, "name": self._head["name"]}
        return [{**done, self.field: self.text}]


class _CustomCallItem(_CallItem):
    kind, field, event = "custom_tool_call", "input", "response.custom_tool_call_input"

    def __init__(self, item_id: str, output_index: int, call_id: str, name: ToolName) -> None:
        super().__init__(item_id, output_index, call_id, name)
        self._input = CustomInputReader()

    def add(self, arguments: str) -> list[Event]:
        return super().add(self._input.feed(arguments))


@dataclass(slots=True)
class _PendingSpace:
    """White space that begins the next item if it has the same ``kind``; dropped otherwise."""

    kind: str
    text: str = ""
    logprobs: tuple[Item, ...] = ()


class OutputBuilder:
    """Builds the output of one response.

    White space alone does not form an item: models write it between the delimiters of their format.

    Args:
        ids: creates the ids of items.
        custom: names of the custom tools, as declared to the model.
        encodes_reasoning: whether ``include`` has ``reasoning.encrypted_content``.
        namespaced: tools of namespaces, by the name that is declared to the model.
    """

    def __init__(
        self,
        ids: ItemIdGenerator,
        custom: frozenset[str],
        encodes_reasoning: bool,
        namespaced: Mapping[str, ToolName] | None = None,
    ) -> None:
        self._ids = ids
        self._custom_names = custom
        self._namespaced_names = namespaced or {}
        self._encodes_reasoning = encodes_reasoning
        self._current_item: OpenItem | None = None
        self._pending_space: _PendingSpace | None = None
        self._call_index = -1
        self.items: list[Item] = []
        """Complete items."""
        self.reasoning: list[str] = []
        """Texts of the complete reasoning items."""

    def add_text(self, text: str, logprobs: Sequence[Item] = ()) -> list[Event]:
        """Add message text and return its events."""
        item, events = self._open_item(_MessageItem.kind, text, tuple(logprobs))
        if item is None:
            return events
        assert isinstance(item, _MessageItem)
        space = self._take_pending_space()
        return [*events, *item.add(space.text + text, [*space.logprobs, *logprobs])]

    def add_reasoning(self, text: str) -> list[Event]:
        """Add reasoning text and return its events."""
        item, events = self._open_item(_ReasoningItem.kind, text, ())
        if item is None:
            return events
        assert isinstance(item, _ReasoningItem)
        return [*events, *item.add(self._take_pending_space().text + text)]

    def add_call(self, piece: CallDelta) -> list[Event]:
        """Add a piece of a tool call and return its events."""
        events: list[Event] = []
        if piece.index != self._call_index:
            self._call_index, name = piece.index, piece.name or ""
            kind = _CustomCallItem if name in self._custom_names else _CallItem
            index, item_id = self._next_index, self._ids.new(kind.kind)
            self._pending_space = None
            named = self._namespaced_names.get(name) or ToolName(name)
            events += self._begin(kind(item_id, index, piece.call_id or "", named))
        assert isinstance(self._current_item, _CallItem), "the pieces of a call follow each other"
        return events + self._current_item.add(piece.arguments)

    def end(self, has_ended: bool, has_calls: bool) -> list[Event]:
        """End the choice and return the last events.

        Args:
            has_ended: whether the model ended the choice; if not, a last text item is incomplete.
            has_calls: whether the last call is complete.
        """
        events: list[Event] = []
        if self._current_item is None and not self.items:  # an output has at least an empty message
            space = self._take_pending_space()
            message = self._new(_MessageItem.kind)
            assert isinstance(message, _MessageItem)
            events += self._begin(message)
            if space.text and space.kind == _MessageItem.kind:
                events += message.add(space.text, space.logprobs)
        is_whole = has_calls if isinstance(self._current_item, _CallItem) else has_ended
        return events + self._end(_COMPLETED if is_whole else _INCOMPLETE)

    def output(self) -> list[Item]:
        """Return all items, including an item that is not complete."""
        return self.items + (
            [self._current_item.item(_INCOMPLETE)] if self._current_item is not None else []
        )

    @property
    def _next_index(self) -> int:
        return len(self.items) + (self._current_item is not None)

    def _open_item(
        self, kind: str, text: str, logprobs: tuple[Item, ...]
    ) -> tuple[OpenItem | None, list[Event]]:
        """Return the open item of ``kind`` (None if ``text`` is held back) and its new events."""
        if self._pending_space is None or self._pending_space.kind != kind:
            self._pending_space = _PendingSpace(kind)
        if self._current_item is not None and self._current_item.kind == kind:
            return self._current_item, []
        if not text.strip():
            self._pending_space.text += text
            self._pending_space.logprobs += logprobs
            return None, []
        item = self._new(kind)
        return item, self._begin(item)

    def _take_pending_space(self) -> _PendingSpace:
        space, self._pending_space = self._pending_space or _PendingSpace(""), None
        return space

    def _new(self, kind: str) -> OpenItem:
        index, item_id = self._next_index, self._ids.new(kind)
        if kind == _MessageItem.kind:
            return _MessageItem(item_id, index)
        return _ReasoningItem(item_id, index, self._encodes_reasoning)

    def _begin(self, item: OpenItem) -> list[Event]:
        """Close the open item and open ``item``."""
        events = self._end(_COMPLETED)
        self._current_item = item
        return events + item.open()

    def _end(self, status: str) -> list[Event]:
        if self._current_item is None:
            return []
        ended, self._current_item = self._current_item, None
        self.items.append(ended.item(status))
        if isinstance(ended, _ReasoningItem):
            self.reasoning.append(ended.text)
        return ended.close(status)
