"""Reasons why a request continues at another worker."""

from __future__ import annotations

from enum import Enum


class ReplayCause(Enum):
    LOST = "attention_worker"
    """Its worker was lost."""
    HANDED_BACK = "handed_back"
    """Its worker is drained, or could not run it."""
    MOVED = "moved"
    """It moved to another worker, which has fetched its KV blocks."""
