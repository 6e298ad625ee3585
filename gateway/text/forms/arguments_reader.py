"""Read the arguments of a call as JSON text, from a JSON object or from individual values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum, auto

from gateway.core.tool_use import Tool
from gateway.text.forms.argument_text import ArgumentText, ObjectEnd
from gateway.text.forms.argument_values import ValueReader
from gateway.text.forms.call_syntax import PairSyntax, Slot
from gateway.text.forms.lookahead import Lookahead
from gateway.text.forms.marks import Outcome, overlap, read_parts


class ArgumentsState(Enum):
    """The next part of the text of a call."""

    OBJECT = auto()
    """The rest of a JSON object."""
    PAIR = auto()
    """The next argument, or the end of all."""
    VALUE = auto()
    """The rest of a value."""
    COMPLETE = auto()
    """Text after the arguments, which are complete."""
    BROKEN = auto()
    """Text that interrupts the arguments, which are incomplete."""


class ArgumentsReader:
    """Reads the arguments of successive calls and finds their ends.

    Args:
        pairs: format of individual values; None if arguments are a JSON object.
        tools: the functions by name.
        ahead: the text to read.
    """

    def __init__(
        self, pairs: PairSyntax | None, tools: Mapping[str, Tool], ahead: Lookahead
    ) -> None:
        self._pairs = pairs
        self._tools = tools
        self._ahead = ahead
        self._readers: dict[str, ValueReader] = {}
        self._json = ObjectEnd()
        self._values: ValueReader | None = None
        self._value: ArgumentText | None = None
        self._has_pairs = False
        self.state = ArgumentsState.COMPLETE

    def begin(self, name: str) -> None:
        """Start to read the arguments of a call of the function ``name``."""
        if self._pairs is None:
            self._json, self.state = ObjectEnd(), ArgumentsState.OBJECT
        else:
            self._values = self._readers.setdefault(name, ValueReader(self._tools[name]))
            self._has_pairs, self.state = False, ArgumentsState.PAIR

    def read(self) -> str:
        """Read the next part and return the JSON text that is final."""
        if self._pairs is None:
            return self._read_object()
        if self.state is ArgumentsState.VALUE:
            return self._read_value()
        return self._read_pair(self._pairs)

    def _read_object(self) -> str:
        piece, is_end = self._json.read(self._ahead.text)
        self._ahead.drop(len(piece))
        if is_end:
            self.state = ArgumentsState.COMPLETE
        return piece

    def _read_value(self) -> str:
        assert self._value is not None, "the state is VALUE"
        ahead = self._ahead
        ahead.text, written, is_end = self._value.read(ahead.text, ahead.is_last)
        if is_end:
            self.state = ArgumentsState.PAIR
        return written

    def _read_pair(self, pairs: PairSyntax) -> str:
        """Read up to the next value, or up to the end of the arguments."""
        ahead = self._ahead
        if ahead.skip(pairs.close):
            self.state = ArgumentsState.COMPLETE
            return "}" if self._has_pairs else "{}"
        reading = read_parts(pairs.head, ahead.window)
        is_open = reading.outcome is Outcome.PARTIAL or ahead.may_begin((pairs.close,))
        if is_open and ahead.waits:
            return ""
        key = reading.slots.get(Slot.KEY, "")
        if reading.outcome is Outcome.WHOLE:
            opening = self._opening(key)
            self._has_pairs = True
            assert self._values is not None, "a head was read"
            writer = self._values.writer(key, reading.slots.get(Slot.IS_TEXT))
            self._value = ArgumentText(writer, pairs)
            ahead.drop(reading.end)
            self.state = ArgumentsState.VALUE
            return f"{opening}: "
        self.state = ArgumentsState.BROKEN
        if not is_open or not ahead.has_room:
            return ""
        ahead.drop()
        key = _without_mark(key, pairs)
        return self._opening(key)[:-1] if key else ""

    def _opening(self, key: str) -> str:
        return (", " if self._has_pairs else "{") + json.dumps(key, ensure_ascii=False)


def _without_mark(key: str, pairs: PairSyntax) -> str:
    """Return the name of an argument without a partial delimiter at its end."""
    end = str(pairs.head[pairs.head.index(Slot.KEY) + 1]).strip()
    return key[: len(key) - overlap(key, (end,))]
