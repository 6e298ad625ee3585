"""Where the answer begins in a text that comes in pieces: stops count there alone."""

from __future__ import annotations

import re

from gateway.core.thinking import BEGIN, END, Thinking
from gateway.text.harmony.marks import MESSAGE

_MAX_MARK_CHARS = 256
"""Longest mark that is looked for across pieces; a header of Harmony may hold a content type."""
_END_OF_REASONING = re.compile(re.escape(END))
_MESSAGE_OR_CALL = re.compile(
    r"<\|channel\|>[^\w<]*(final|commentary)\b[^<]*(<\|constrain\|>[^<]*)?<\|message\|>"
)


class AnswerRegion:
    """Divides the text of one choice into reasoning and answer, piece by piece."""

    def __init__(self, begins: re.Pattern[str], *, may_have_none: bool, skips_breaks: bool) -> None:
        """``begins``: the mark before the answer. ``may_have_none``: a text that does not begin
        with ``<think>`` is all answer. ``skips_breaks``: line breaks after the mark are no answer.
        """
        self._begins = begins
        self._is_undecided = may_have_none
        self._skips_breaks = skips_breaks
        self._has_mark = False
        self._seen = ""
        self.is_open = False
        """The answer has begun."""

    @classmethod
    def after_thinking(cls, thinking: Thinking) -> AnswerRegion:
        """Of a text with reasoning between ``<think>`` and ``</think>``."""
        is_possible = thinking is Thinking.POSSIBLE
        return cls(_END_OF_REASONING, may_have_none=is_possible, skips_breaks=True)

    @classmethod
    def of_harmony(cls, open_message: str) -> AnswerRegion:
        """Of a text in the Harmony format, whose prompt leaves this header open."""
        found = cls(_MESSAGE_OR_CALL, may_have_none=False, skips_breaks=False)
        found.is_open = open_message.endswith(MESSAGE) and bool(
            _MESSAGE_OR_CALL.search(open_message)
        )
        return found

    def split(self, new: str) -> tuple[str, str]:
        """What of a piece is before the answer, and what is of it. What is undecided waits."""
        if self._is_undecided:
            self._seen += new
            words = self._seen.lstrip()
            if BEGIN.startswith(words[: len(BEGIN)]) and len(words) < len(BEGIN):
                return "", ""
            self._is_undecided, new, self._seen = False, self._seen, ""
            self.is_open = not words.startswith(BEGIN)
        if self.is_open:
            return "", new
        if not self._has_mark:
            text = self._seen + new
            match = self._begins.search(text)
            if match is None:
                self._seen = text[-_MAX_MARK_CHARS:]
                return new, ""
            self._has_mark, place = True, match.end() - len(self._seen)
        else:
            place = 0
        rest = new[place:]
        answer = rest.lstrip("\n") if self._skips_breaks else rest
        self.is_open = bool(answer) or not self._skips_breaks
        return new[: len(new) - len(answer)], answer

    def flush(self) -> str:
        """Text that still waits, at the end; it is of the answer."""
        if not self._is_undecided:
            return ""
        self._is_undecided, self.is_open = False, True
        return self._seen
