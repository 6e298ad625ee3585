"""Thread that writes the log of a process, so that a disk that hangs blocks no other thread."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread, current_thread
from typing import TextIO

logger = logging.getLogger(__name__)

LIMIT_S = 0.5
"""Longest wait of a thread until its log line is written, in seconds."""
MAX_WAITING = 10_000
"""Maximum number of log lines that wait for the disk; further lines are lost."""


class LineWriter:
    """Writes lines in order, in a background thread. May be called on any thread.

    ``put`` returns once the line is written, so that the last lines of a process are in its log.
    ``put`` waits at most ``LIMIT_S``; after a timeout, no call waits again before all pending lines
    are written. ``put`` never waits on a thread that runs an event loop.

    Args:
        write: writes a line to a stream; must not raise.
    """

    def __init__(self, write: Callable[[TextIO, str], None]) -> None:
        self._write = write
        self._changed = Condition()
        self._waiting: deque[tuple[TextIO, str]] = deque()
        self._num_put = self._num_written = self._num_lost = 0
        self._is_late = False
        self._thread: Thread | None = None

    def put(self, stream: TextIO, line: str) -> None:
        """Write a line to ``stream``; may wait, and may drop the line (``MAX_WAITING``)."""
        if sys.is_finalizing():  # threads have ended
            self._write(stream, line)
            return
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                self._num_lost += 1
                return
            self._waiting.append((stream, line))
            self._num_put += 1
            if self._thread is None or not self._thread.is_alive():  # no thread survives a fork
                self._thread = Thread(target=self._run, name="log-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if not _has_event_loop():
            self.wait()

    def wait(self) -> None:
        """Wait until all lines so far are written, at most ``LIMIT_S``.

        After a timeout, calls return immediately until all pending lines are written.
        """
        with self._changed:
            if not self._is_late and current_thread() is not self._thread:
                last = self._num_put
                is_written = self._changed.wait_for(lambda: self._num_written >= last, LIMIT_S)
                self._is_late = not is_written

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                stream, line = self._waiting[0]
            self._write(stream, line)
            with self._changed:
                self._waiting.popleft()
                self._num_written += 1
                num_lost = 0
                if not self._waiting:
                    self._is_late = False
                    num_lost, self._num_lost = self._num_lost, 0
                self._changed.notify_all()
            if num_lost:
                logger.warning("%d lines were lost: the disk of the log did not respond", num_lost)


def _has_event_loop() -> bool:
    """Return whether the calling thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
