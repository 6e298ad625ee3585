"""Parts of a generated page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def page(title: str, introduction: str, *parts: str) -> str:
    """A whole page, with a comment that says how it is made."""
    comment = "<!-- written by `python -m docs.generate`, do not edit -->"
    return "\n\n".join([comment, f"# {title}", introduction, *filter(None, parts)]) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; empty where there are no rows."""
    lines = [_row(cells) for cells in rows]
    return "\n".join([_row(columns), _row(["---"] * len(columns)), *lines]) if lines else ""


def code(text: object) -> str:
    """Inline code; nothing for empty text."""
    return f"`{text}`" if str(text) else ""


def prose(text: str) -> str:
    """Text of a docstring or a comment on one line, as Markdown that shows it literally."""
    plain = re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split()))
    halves = re.split(r"(`[^`]*`)", plain)  # code keeps its characters
    return "".join(h if h.startswith("`") else re.sub(r"([<>*\[\]{}])", r"\\\1", h) for h in halves)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
