"""The text at the end of an answer that is not parsed yet, which grows as text arrives."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.text.tool_formats.delimiters import is_delimiter_prefix

MAX_WAITING_CHARS = 512
"""Maximum length in characters of a tool call's head or a delimiter. Longer text is content, so
that clients need not wait for its end."""


class Lookahead:
    """Text of an answer that is not parsed yet, and whether to wait for more text."""

    def __init__(self) -> None:
        self.text = ""
        self.is_last = False
        """Whether the answer has ended, so that no text follows."""

    @property
    def window(self) -> str:
        """The first part of the unparsed text. Its length is limited, so that decisions do not
        depend on how the text is split into pieces."""
        return self.text[:MAX_WAITING_CHARS]

    @property
    def stripped_window(self) -> str:
        """The first part (window) of the unparsed text without leading white space."""
        return self.window.lstrip()

    @property
    def may_grow(self) -> bool:
        """Whether the unparsed text is so short that an incomplete match may become complete."""
        return len(self.text) < MAX_WAITING_CHARS

    @property
    def needs_more_text(self) -> bool:
        """Whether the answer goes on and an incomplete match may become complete."""
        return not self.is_last and self.may_grow

    def is_prefix_of(self, delimiters: Sequence[str]) -> bool:
        """Whether the unparsed text after white space is a proper prefix of a delimiter."""
        return is_delimiter_prefix(self.stripped_window, delimiters)

    def skip_delimiter(self, delimiter: str) -> bool:
        """If the unparsed text begins with ``delimiter``, drop the delimiter and white space before
        it, and return True; otherwise return False."""
        if not self.stripped_window.startswith(delimiter):
            return False
        self.text = self.text.lstrip()[len(delimiter) :]
        return True

    def drop(self, num_chars: int | None = None) -> None:
        """Drop the first ``num_chars`` characters of the unparsed text; None drops all of it."""
        self.text = "" if num_chars is None else self.text[num_chars:]
