"""Reads the arguments of a call as JSON text, from a JSON object or from individual values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum, auto

from gateway.core.tool_use import Tool
from gateway.text.tool_formats.argument_text import ArgumentReader, JsonObjectScanner
from gateway.text.tool_formats.argument_values import ValueWriters
from gateway.text.tool_formats.call_syntax import PairSyntax, Placeholder
from gateway.text.tool_formats.delimiters import MatchOutcome, match_parts, partial_delimiter_length
from gateway.text.tool_formats.lookahead import Lookahead


class ArgumentsState(Enum):
    """State of reading a tool call's arguments: the kind of text that follows."""

    OBJECT = auto()
    """The rest of the JSON object with all arguments follows."""
    PAIR = auto()
    """The next argument (name and value), or the end of all arguments, follows."""
    VALUE = auto()
    """The rest of the value of one argument follows."""
    COMPLETE = auto()
    """The arguments are complete; other text follows."""
    BROKEN = auto()
    """The arguments are incomplete; other text interrupts them."""


class ArgumentsReader:
    """Reads the arguments of successive tool calls as JSON text, and finds the arguments' ends.

    Args:
        pairs: format of individual values; None if arguments are a JSON object.
        tools: the functions by name.
        ahead: the unparsed text of the answer, which grows.
    """

    def __init__(
        self, pairs: PairSyntax | None, tools: Mapping[str, Tool], ahead: Lookahead
    ) -> None:
        self._pairs = pairs
        self._tools = tools
        self._lookahead = ahead
        self._writers_by_tool: dict[str, ValueWriters] = {}
        self._object_scanner = JsonObjectScanner()
        self._value_writers: ValueWriters | None = None
        self._argument_reader: ArgumentReader | None = None
        self._has_pairs = False
        self.state = ArgumentsState.COMPLETE

    def begin(self, name: str) -> None:
        """Start to read the arguments of a call of the function ``name``."""
        if self._pairs is None:
            self._object_scanner, self.state = JsonObjectScanner(), ArgumentsState.OBJECT
        else:
            if name not in self._writers_by_tool:
                self._writers_by_tool[name] = ValueWriters(self._tools[name])
            self._value_writers = self._writers_by_tool[name]
            self._has_pairs, self.state = False, ArgumentsState.PAIR

    def read(self) -> str:
        """Read the next part of the arguments and return the JSON text that is final."""
        if self._pairs is None:
            return self._read_object()
        if self.state is ArgumentsState.VALUE:
            return self._read_value()
        return self._read_pair(self._pairs)

    def _read_object(self) -> str:
        piece, is_end = self._object_scanner.read(self._lookahead.text)
        self._lookahead.drop(len(piece))
        if is_end:
            self.state = ArgumentsState.COMPLETE
        return piece

    def _read_value(self) -> str:
        assert self._argument_reader is not None, "the state is VALUE"
        ahead = self._lookahead
        ahead.text, written, is_end = self._argument_reader.read(ahead.text, ahead.is_last)
        if is_end:
            self.state = ArgumentsState.PAIR
        return written

    def _read_pair(self, pairs: PairSyntax) -> str:
        """Read up to the next value, or up to the end of the arguments."""
        ahead = self._lookahead
        if ahead.skip_delimiter(pairs.close):
            self.state = ArgumentsState.COMPLETE
            return "}" if self._has_pairs else "{}"
        reading = match_parts(pairs.head, ahead.window)
        is_open = reading.outcome is MatchOutcome.PARTIAL or ahead.is_prefix_of((pairs.close,))
        if is_open and ahead.needs_more_text:
            return ""
        key = reading.values.get(Placeholder.KEY, "")
        if reading.outcome is MatchOutcome.WHOLE:
            opening = self._key_opening(key)
            self._has_pairs = True
            assert self._value_writers is not None, "a head was read"
            writer = self._value_writers.make_writer(key, reading.values.get(Placeholder.IS_TEXT))
            self._argument_reader = ArgumentReader(writer, pairs)
            ahead.drop(reading.end)
            self.state = ArgumentsState.VALUE
            return f"{opening}: "
        self.state = ArgumentsState.BROKEN
        if not is_open or not ahead.may_grow:
            return ""
        ahead.drop()
        key = _strip_partial_delimiter(key, pairs)
        return self._key_opening(key)[:-1] if key else ""

    def _key_opening(self, key: str) -> str:
        return (", " if self._has_pairs else "{") + json.dumps(key, ensure_ascii=False)


def _strip_partial_delimiter(key: str, pairs: PairSyntax) -> str:
    """Return the name of an argument without a partial delimiter at its end."""
    end = str(pairs.head[pairs.head.index(Placeholder.KEY) + 1]).strip()
    return key[: len(key) - partial_delimiter_length(key, (end,))]
