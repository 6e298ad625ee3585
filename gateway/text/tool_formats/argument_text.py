"""Finds the end of a tool call's arguments in a text that arrives in pieces.

The arguments are a JSON object, or single values.
"""

from __future__ import annotations

import re

from gateway.text.tool_formats.argument_values import ANY_OPENING, ValueWriter
from gateway.text.tool_formats.call_syntax import PairSyntax
from gateway.text.tool_formats.delimiters import partial_delimiter_length, split_at_delimiter

_STRING_REST = re.compile(r'(?:[^"\\]|\\.)*("?)', re.DOTALL)
"""Pattern of the rest of a JSON string, up to its end or to an incomplete escape."""


class JsonObjectScanner:
    """Finds the end of a JSON object in a text that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = False
        self._is_escaped = False

    def read(self, text: str) -> tuple[str, bool]:
        """Read the next piece; return its part in the JSON object, and whether the object ends."""
        for index, char in enumerate(text):
            if self._is_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._is_string = False
            elif char == '"':
                self._is_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return text[: index + 1], True
        return text, False


class ArgumentReader:
    """Reads the value of one argument, for tool call formats that write arguments one by one."""

    def __init__(self, writer: ValueWriter, syntax: PairSyntax) -> None:
        self._writer = writer
        self._end = syntax.end
        self._has_breaks = syntax.has_breaks
        self._is_begun = not syntax.has_breaks
        self._is_json: bool | None = None  # not known yet
        self._pending_json = ""  # JSON text; its strings may contain the delimiter
        self._delimiter_finder = _DelimiterFinder()

    def read(self, text: str, is_last: bool) -> tuple[str, str, bool]:
        """Read the next piece of the value.

        Returns the unread text, the JSON of the read text, and whether the value ends.
        """
        if not self._is_begun and (text or is_last):
            text, self._is_begun = text.removeprefix("\n"), True
        if self._is_json is None:
            openings, first = self._writer.json_openings, text.lstrip()[:1]
            if openings and not (first or is_last):
                return text, "", False
            self._is_json = openings == ANY_OPENING or (first != "" and first in openings)
        return self._read_json(text, is_last) if self._is_json else self._read(text, is_last)

    def _read(self, text: str, is_last: bool) -> tuple[str, str, bool]:
        value, delimiter, rest = split_at_delimiter(text, (self._end,))
        if delimiter:
            return rest, self._finish_value(value), True
        delimiters = (self._end, f"\n{self._end}") if self._has_breaks else (self._end,)
        kept = partial_delimiter_length(value, delimiters)
        certain, rest = value[: len(value) - kept], value[len(value) - kept :]
        if is_last:  # an incomplete delimiter at the end of the answer is not part of the value
            return "", self._writer.feed(certain) + self._writer.finish_incomplete(), False
        return rest, self._writer.feed(certain), False

    def _read_json(self, text: str, is_last: bool) -> tuple[str, str, bool]:
        """Read the next piece of a value that is JSON, with the same results as ``read``.

        If a string in the value does not end, the first delimiter ends the value.
        """
        pending = self._pending_json + text
        position = self._delimiter_finder.find(pending, self._end)
        if position < 0 and not is_last:
            self._pending_json = pending
            return "", "", False
        if position < 0:
            return self._read(pending, is_last)
        return pending[position + len(self._end) :], self._finish_value(pending[:position]), True

    def _finish_value(self, value: str) -> str:
        value = value.removesuffix("\n") if self._has_breaks else value
        return self._writer.feed(value) + self._writer.finish()


class _DelimiterFinder:
    """Finds a delimiter outside of the strings of a JSON text that grows."""

    def __init__(self) -> None:
        self._place = 0
        self._is_string = False

    def find(self, text: str, delimiter: str) -> int:
        """Return the position of the delimiter, or -1 if the text does not contain it yet."""
        while self._place < len(text):
            if self._is_string:
                quote = _STRING_REST.match(text, self._place)
                assert quote is not None, "it matches an empty text"
                self._place = quote.end()
                if not quote[1]:
                    return -1
                self._is_string = False
                continue
            opening = text.find('"', self._place)
            position = text.find(delimiter, self._place)
            if position >= 0 and (opening < 0 or position < opening):
                return position
            if opening < 0:
                self._place = len(text) - partial_delimiter_length(text, (delimiter,))
                return -1
            self._place, self._is_string = opening + 1, True
        return -1
