"""Log records of every process in one format, with their request and generation.

Records are written to stderr, which Ray redirects to a file. The newest records also stay in
memory, from which ``expertmesh logs`` reads them on any host. Other libraries log only warnings.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, TextIO

from cluster.tracing.line_writer import LineWriter
from cluster.tracing.output_files import OutputFiles

LogForm = Literal["text", "json"]
PACKAGES = ("cluster", "workers", "gateway")
"""Names of the packages that log at level INFO."""
MAX_LINES = 2000
"""Maximum number of log lines that stay in memory."""
MAX_LINE_CHARACTERS = 4000
"""Maximum length of a log line that stays in memory; the rest is cut off."""
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
}
"""Standard attributes of a ``logging.LogRecord``; other attributes are ``extra`` fields."""


class Context:
    """Fields that all log records of this process share."""

    def __init__(self) -> None:
        self.process = ""
        """Name of the worker, the gateway or the controller."""
        self.generation = 0
        """Number of the running generation (membership of the cluster); 0 before the first one."""
        self.request_id: Callable[[], str] = lambda: ""
        """Returns the id of the request that the running code serves; empty outside a request."""


CONTEXT = Context()


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Convert a log record to a dict with its ``extra`` fields; ``ts``: seconds since 1970."""
    found: dict[str, Any] = {
        "ts": round(record.created, 6),
        "level": record.levelname,
        "process": CONTEXT.process,
        "logger": record.name,
        "generation": CONTEXT.generation,
        "request_id": CONTEXT.request_id(),
        "message": record.getMessage(),
    }
    own = {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}
    found |= {name: value for name, value in own.items() if not name.startswith("_")}  # Ray's
    if record.exc_info and record.exc_info[1] is not None:
        found["exception"] = logging.Formatter().formatException(record.exc_info)
    return found


class JsonFormatter(logging.Formatter):
    """Formats each log record as one line with a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(fields_of(record), default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Formats each log record as a line of text.

    Example: ``2026-11-27T12:01:02.345+00:00 WARNING expert-0 g3 req-1 lost attention-0
    cause=killed``.
    """

    def format(self, record: logging.LogRecord) -> str:
        found = fields_of(record)
        at = datetime.fromtimestamp(record.created).astimezone()
        clock = at.isoformat(timespec="milliseconds")
        head = [clock, found["level"], found["process"] or "-"]
        head += [f"g{found['generation']}"] if found["generation"] else []
        head += [found["request_id"]] if found["request_id"] else []
        known = ("ts", "level", "process", "logger", "generation", "request_id", "message")
        more = [f"{k}={v}" for k, v in found.items() if k not in (*known, "exception")]
        text = " ".join([*head, found["message"], *more])
        return f"{text}\n{found['exception']}" if "exception" in found else text


class RecentLines(logging.StreamHandler[TextIO]):
    """Logging handler that writes each record and keeps the newest lines. Thread-safe."""

    def __init__(self, size: int = MAX_LINES, stream: TextIO | None = None) -> None:
        """``size``: number of lines kept in memory. ``stream``: output stream; None for stderr."""
        super().__init__(stream or sys.stderr)
        self._lines: deque[str] = deque(maxlen=size)
        self._number = 0
        self._guard = threading.Lock()
        self.output = OutputFiles()
        """Rotates Ray's files to which the lines are written, if any."""
        self._writer = LineWriter(self._write)

    def handle(self, record: logging.LogRecord) -> bool:
        """Handle a record without the handler's lock, because writing the record may wait."""
        if is_wanted := bool(self.filter(record)):
            self.emit(record)
        return is_wanted

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # text that cannot be encoded, as in file names, is shown as escaped bytes
            line = self.format(record).encode("utf-8", "backslashreplace").decode()
        except Exception:  # as in logging's own handlers
            self.handleError(record)
            return
        with self._guard:
            self._number += 1
            self._lines.append(line[:MAX_LINE_CHARACTERS])
        self._writer.put(self.stream, f"{line}{self.terminator}")

    def flush(self) -> None:
        """Wait until all lines so far are written, but not for a disk that hangs."""
        self._writer.wait()

    def _write(self, stream: TextIO, line: str) -> None:
        with contextlib.suppress(Exception):  # a full disk must not end the process
            self.output.rotate()
        with contextlib.suppress(Exception):
            stream.write(line)
            stream.flush()

    def since(self, number: int, at_most: int = MAX_LINES) -> tuple[int, list[str]]:
        """Return the number of all lines so far, and the stored lines after line ``number``.

        If there are more than ``at_most`` such lines, only the newest are returned.
        """
        with self._guard:
            wanted = min(self._number - number, len(self._lines), at_most)
            return self._number, list(self._lines)[len(self._lines) - max(wanted, 0) :]


RECENT_LINES = RecentLines()
"""Logging handler of this process."""
OUTPUT = RECENT_LINES.output


def set_up(process: str, form: LogForm = "text", stream: TextIO | None = None) -> None:
    """Set the log format of this process; a later call replaces an earlier one.

    Args:
        process: name of the process.
        form: ``text``, or ``json`` for machines.
        stream: output stream; None: stderr.
    """
    CONTEXT.process = process
    RECENT_LINES.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    if stream is None:
        OUTPUT.redirect_streams()
    RECENT_LINES.setStream(stream or sys.stderr)
    root = logging.getLogger()
    root.addHandler(RECENT_LINES)
    root.setLevel(logging.WARNING)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def format_library_logs(*libraries: str) -> None:
    """Make libraries with their own handlers use the format of this module."""
    for name in libraries:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.propagate = True
        for handler in list(logger.handlers):
            stream = getattr(handler, "stream", None)
            if stream is not None and stream in (sys.stderr, sys.__stderr__):
                logger.removeHandler(handler)
