"""Progress of long tasks on stderr: a bar on a terminal, occasional lines otherwise."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

from cluster.cli.terminal.output import write_message

INTERVAL_S = 5.0
_TICK_S = 1.0
_BAR = 24
_STAGES = {
    "check": "checking the checkpoint",
    "ray": "starting Ray",
    "workers": "starting workers",
    "weights": "loading weights",
    "gateway": "opening the gateway",
}


class Progress(AbstractContextManager["Progress"]):
    """Shows the progress of one stage at a time. The end of the ``with`` block clears the line."""

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        lines: bool = True,
    ) -> None:
        """``lines``: whether to print lines if ``stream`` is not a terminal."""
        self._stream = stream or sys.stderr
        self._clock = clock
        self._bar = self._stream.isatty()
        self._lines = lines
        self._began = clock()
        self._shown_at = self._began
        self._text = ""
        self._width = 0

    def __exit__(self, *error: object) -> None:
        self.clear()

    def update(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Show a new stage, or the progress of the present one: ``done`` of ``total``."""
        self._text = _STAGES.get(stage, stage)
        if total:
            self._text += f" {_bar(done, total) if self._bar else ''}{_megabytes(done, total)}"
        self.tick()

    def tick(self) -> None:
        """Redraw the bar, or print a line if one is due."""
        now = self._clock()
        if self._bar:
            self._draw(f"{self._text}, {now - self._began:.0f} s")
        elif self._lines and now - self._shown_at >= INTERVAL_S:
            self._shown_at = now
            write_message(self._stream, f"expertmesh: {self._text}, {now - self._began:.0f} s\n")

    def clear(self) -> None:
        """Clear the progress line on a terminal."""
        if self._bar and self._width:
            self._draw("")
            write_message(self._stream, "\r")

    def _draw(self, text: str) -> None:
        write_message(self._stream, f"\r{text.ljust(self._width)}")
        self._width = len(text)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show ``text`` with the elapsed seconds while a blocking call takes more than one second."""
    ended = threading.Event()

    def show() -> None:
        with Progress() as progress:
            while not ended.wait(_TICK_S):
                progress.update(text)

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _bar(done: int, total: int) -> str:
    filled = min(_BAR, _BAR * done // total)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] "


def _megabytes(done: int, total: int) -> str:
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
