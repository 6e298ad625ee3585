"""The undecided end of an answer's text, which grows as text arrives."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.text.tool_formats.delimiters import is_delimiter_prefix

MAX_WAITING_CHARS = 512
"""Maximum length of a call head or another delimiter; longer text is content, so that clients do
not wait for its end."""


class Lookahead:
    """Text that is not parsed yet; decides whether to wait for more text."""

    def __init__(self) -> None:
        self.text = ""
        self.is_last = False
        """Whether the answer has ended, so that no text follows."""

    @property
    def window(self) -> str:
        """The text to examine; its limit makes decisions independent of the pieces."""
        return self.text[:MAX_WAITING_CHARS]

    @property
    def stripped_window(self) -> str:
        """The window without leading white space."""
        return self.window.lstrip()

    @property
    def may_grow(self) -> bool:
        """Whether the text is shorter than the window, so that an incomplete match may complete."""
        return len(self.text) < MAX_WAITING_CHARS

    @property
    def needs_more_text(self) -> bool:
        """Whether an incomplete match may still complete: more text may follow."""
        return not self.is_last and self.may_grow

    def is_prefix_of(self, delimiters: Sequence[str]) -> bool:
        """Whether ``words`` is a proper prefix of one of the delimiters ``delimiters``."""
        return is_delimiter_prefix(self.stripped_window, delimiters)

    def skip_delimiter(self, delimiter: str) -> bool:
        """Drop a delimiter and the white space before it if it is next; return whether it was."""
        if not self.stripped_window.startswith(delimiter):
            return False
        self.text = self.text.lstrip()[len(delimiter) :]
        return True

    def drop(self, num_chars: int | None = None) -> None:
        """Drop the first ``num_chars`` characters; None drops all."""
        self.text = "" if num_chars is None else self.text[num_chars:]
