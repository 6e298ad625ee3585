"""Separates a model's answer from its reasoning in a text that arrives in pieces.

Stop strings apply only to the answer.
"""

from __future__ import annotations

import re

from gateway.core.thinking import BEGIN, END, Thinking
from gateway.text.harmony.special_tokens import ENDS, MESSAGE, START

_MAX_MARK_CHARS = 256
"""Maximum length of a delimiter that is found across pieces of text. This suffices for a Harmony
header with a content type."""
_END_OF_REASONING = re.compile(re.escape(END))
_END_OF_MESSAGE = re.compile("|".join(map(re.escape, (*ENDS, START))))
_MESSAGE_OR_CALL = re.compile(
    r"<\|channel\|>[^\w<]*(final|commentary)\b[^<]*(<\|constrain\|>[^<]*)?<\|message\|>"
)


class AnswerRegion:
    """Divides the text of one choice into reasoning and answer, piece by piece."""

    def __init__(
        self,
        begin_pattern: re.Pattern[str],
        end_pattern: re.Pattern[str] | None = None,
        *,
        may_have_none: bool,
        skips_line_breaks: bool,
    ) -> None:
        """``begin_pattern`` matches the delimiter before the answer. ``end_pattern`` matches a
        delimiter after which reasoning and more of the answer may follow; None if the answer
        lasts to the end of the text. With ``may_have_none``, a text that does not start with
        ``<think>`` is all answer. With ``skips_line_breaks``, line breaks after the first
        delimiter are not part of the answer.
        """
        self._begin_pattern = begin_pattern
        self._end_pattern = end_pattern
        self._is_undecided = may_have_none
        self._skips_line_breaks = skips_line_breaks
        self._has_begun = False
        self._seen = ""
        self.is_open = False
        """Whether the end of the text so far is in the answer, not in reasoning."""

    @classmethod
    def after_thinking(cls, thinking: Thinking) -> AnswerRegion:
        """Create an instance for text with reasoning between ``<think>`` and ``</think>``."""
        is_possible = thinking is Thinking.POSSIBLE
        return cls(_END_OF_REASONING, may_have_none=is_possible, skips_line_breaks=True)

    @classmethod
    def for_harmony(cls, open_message: str) -> AnswerRegion:
        """Create an instance for text in the Harmony format (gpt-oss).

        ``open_message`` is the header of the message that the prompt leaves open; empty if none.
        """
        region = cls(
            _MESSAGE_OR_CALL, _END_OF_MESSAGE, may_have_none=False, skips_line_breaks=False
        )
        region.is_open = open_message.endswith(MESSAGE) and bool(
            _MESSAGE_OR_CALL.search(open_message)
        )
        return region

    def split(self, new: str) -> list[tuple[str, bool]]:
        """Split the next piece of text into pairs (text, whether the text is in the answer).

        Text that may be the beginning of ``<think>`` is held back.
        """
        if self._is_undecided:
            self._seen += new
            stripped = self._seen.lstrip()
            if BEGIN.startswith(stripped[: len(BEGIN)]) and len(stripped) < len(BEGIN):
                return []
            self._is_undecided, new, self._seen = False, self._seen, ""
            self.is_open = not stripped.startswith(BEGIN)
        parts: list[tuple[str, bool]] = []
        while new:
            is_answer = self.is_open
            length = self._answer_length(new) if is_answer else self._length_before_answer(new)
            parts.append((new[:length], is_answer))
            new = new[length:]
        return [part for part in parts if part[0]]

    def _answer_length(self, new: str) -> int:
        """Return the number of characters at the start of ``new`` that are in the answer."""
        if self._end_pattern is None:
            return len(new)
        end = self._find_end(self._end_pattern, new)
        if end is None:
            return len(new)
        self.is_open = False
        return end

    def _length_before_answer(self, new: str) -> int:
        """Return the number of characters at the start of ``new`` that precede the answer."""
        end = 0 if self._has_begun else self._find_end(self._begin_pattern, new)
        if end is None:
            return len(new)
        if not self._skips_line_breaks:
            self.is_open = True
            return end
        self._has_begun = True
        end = len(new) - len(new[end:].lstrip("\n"))
        self.is_open = end < len(new)
        return end

    def _find_end(self, pattern: re.Pattern[str], new: str) -> int | None:
        """Return the end in ``new`` of the first match of ``pattern``, or None if it has no match.

        The match may begin in earlier pieces.
        """
        text = self._seen + new
        match = pattern.search(text)
        end = None if match is None else match.end() - len(self._seen)
        self._seen = text[-_MAX_MARK_CHARS:] if end is None else ""
        return end

    def flush(self) -> str:
        """Return the text that is held back at the end of the output; it belongs to the answer."""
        if not self._is_undecided:
            return ""
        self._is_undecided, self.is_open = False, True
        return self._seen
