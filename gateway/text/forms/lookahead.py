"""The undecided end of an answer's text, which grows as the text comes in."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.text.forms.marks import may_begin

MAX_WAITING_CHARS = 512
"""What is longer without being a head, or what else a form asks for, is text, so that no client
waits for its end."""


class Lookahead:
    """Text that is not decided yet; decides how long it may wait for more."""

    def __init__(self) -> None:
        self.text = ""
        self.is_last = False
        """The answer's end is known: no more text comes."""

    @property
    def window(self) -> str:
        """What is looked at, so that all cuts of a text lead to the same decisions."""
        return self.text[:MAX_WAITING_CHARS]

    @property
    def words(self) -> str:
        """The window from its first word on."""
        return self.window.lstrip()

    @property
    def has_room(self) -> bool:
        """What is not whole could have become so."""
        return len(self.text) < MAX_WAITING_CHARS

    @property
    def waits(self) -> bool:
        """What is not whole may still become so."""
        return not self.is_last and self.has_room

    def may_begin(self, marks: Sequence[str]) -> bool:
        """Whether the words are the beginning of one of these marks, but not all of it."""
        return may_begin(self.words, marks)

    def skip(self, mark: str) -> bool:
        """Drop a mark, with white space before it, if it comes next."""
        if not self.words.startswith(mark):
            return False
        self.text = self.text.lstrip()[len(mark) :]
        return True

    def drop(self, num_chars: int | None = None) -> None:
        """Drop the first characters; all of them without a number."""
        self.text = "" if num_chars is None else self.text[num_chars:]
