"""Reasons why a request continues at another worker."""

from __future__ import annotations

from enum import Enum


class ReplayCause(Enum):
    LOST = "attention_worker"
    """The request's worker was lost."""
    HANDED_BACK = "handed_back"
    """The worker returned the request, because the worker is drained or could not run it."""
    MOVED = "moved"
    """The gateway moved the request to a worker that has fetched its KV blocks."""
