"""The end of an answer's text that is not parsed yet, which grows as text arrives."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.text.tool_formats.delimiters import is_delimiter_prefix

MAX_WAITING_CHARS = 512
"""Maximum length of a call head or another delimiter. Longer text is content, so that clients need
not wait for its end."""


class Lookahead:
    """Text that is not parsed yet; decides whether to wait for more text."""

    def __init__(self) -> None:
        self.text = ""
        self.is_last = False
        """Whether the answer has ended, so that no text follows."""

    @property
    def window(self) -> str:
        """The text to examine, of limited length so that decisions do not depend on the pieces."""
        return self.text[:MAX_WAITING_CHARS]

    @property
    def stripped_window(self) -> str:
        """The window without leading white space."""
        return self.window.lstrip()

    @property
    def may_grow(self) -> bool:
        """Whether the text does not fill the window, so that an incomplete match may complete."""
        return len(self.text) < MAX_WAITING_CHARS

    @property
    def needs_more_text(self) -> bool:
        """Whether an incomplete match may still become complete with more text."""
        return not self.is_last and self.may_grow

    def is_prefix_of(self, delimiters: Sequence[str]) -> bool:
        """Whether the text is a proper prefix of one of ``delimiters``."""
        return is_delimiter_prefix(self.stripped_window, delimiters)

    def skip_delimiter(self, delimiter: str) -> bool:
        """If the delimiter is next, drop it and white space before it; return whether it was."""
        if not self.stripped_window.startswith(delimiter):
            return False
        self.text = self.text.lstrip()[len(delimiter) :]
        return True

    def drop(self, num_chars: int | None = None) -> None:
        """Drop the first ``num_chars`` characters; None drops all."""
        self.text = "" if num_chars is None else self.text[num_chars:]
