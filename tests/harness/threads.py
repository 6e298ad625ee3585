"""Threads that cannot be started, as at a process's limit of threads."""

from __future__ import annotations

import threading

import pytest


def fail_to_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let every start of a thread whose name begins with ``name`` raise."""
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
