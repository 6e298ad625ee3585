"""Why a request continues at another worker."""

from __future__ import annotations

from enum import Enum


class ReplayCause(Enum):
    LOST = "attention_worker"
    """Its worker was lost."""
    HANDED_BACK = "handed_back"
    """Its worker is drained, or had no room for it."""
    MOVED = "moved"
    """Its worker is drained, and another one had fetched its KV blocks before."""
