"""One line of what ``doctor`` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the examination."""

    what: str
    """What was looked at."""
    verdict: Verdict
    """``bad``: ``serve`` would not work."""
    text: str
    """What was found, and what helps."""


def finding(
    what: str, is_ok: bool, text: str, *, fix: str = "", otherwise: Verdict = "bad"
) -> Finding:
    """What was looked at; ``fix`` follows the text where it is not ok."""
    if is_ok:
        return Finding(what=what, verdict="ok", text=text)
    return Finding(what=what, verdict=otherwise, text=f"{text}: {fix}" if fix else text)
