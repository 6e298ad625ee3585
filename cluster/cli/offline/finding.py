"""Result of one check of this host, which ``doctor`` prints as a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Result of one check of ``doctor``."""

    what: str
    """Subject of the check."""
    verdict: Verdict
    """Verdict ``ok``, ``warn`` or ``bad``; with ``bad``, ``serve`` would not work."""
    text: str
    """Result of the check, and a remedy if the verdict is not ``ok``."""


def make_finding(
    what: str, is_ok: bool, text: str, *, fix: str = "", otherwise: Verdict = "bad"
) -> Finding:
    """Make the finding for ``what``, with verdict ``ok`` or ``otherwise``.

    ``fix``: remedy that is appended to the text unless ``is_ok``.
    """
    if is_ok:
        return Finding(what=what, verdict="ok", text=text)
    return Finding(what=what, verdict=otherwise, text=f"{text}: {fix}" if fix else text)
