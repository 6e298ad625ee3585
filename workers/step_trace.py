"""A timeline of a worker's steps in a file: Chrome trace events, which Perfetto opens.

Every worker writes a file of its own; open those of all workers together. Times are those of
CLOCK_MONOTONIC, one clock for all processes of a host. The JSON array is closed when the worker
ends; viewers take one that is not.
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from workers.dist.header import StepHeader

logger = logging.getLogger(__name__)

SUFFIX = ".trace.json"
"""End of the files' names."""


@dataclass(frozen=True, slots=True)
class Span:
    """What a worker did for a while."""

    name: str
    """Kind of work."""
    start_ns: int
    """``time.monotonic_ns`` at its begin."""
    end_ns: int
    """The same at its end."""
    place: dict[str, Any]
    """Step, layer, bank, exchange, micro-batch, rows, as far as they apply."""


class StepTrace:
    """The spans of one worker. Data thread only.

    Two files at most: one that reaches ``max_bytes`` takes the place of the one before it.
    """

    def __init__(self, folder: Path, worker: str, max_bytes: int) -> None:
        """Begin a file. Raises ``ConfigError`` where that is not possible."""
        self._worker = worker
        self._max_bytes = max_bytes
        self._path = folder / f"{worker}-{os.getpid()}{SUFFIX}"
        self._spans: list[Span] = []
        self._size = 0
        self._file: io.FileIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._begin_file()
        except OSError as err:
            raise ConfigError("trace_dir", str(folder), f"must be writable ({err})") from err

    def begin_step(self, header: StepHeader) -> bool:
        """Every step is written down."""
        return True

    def add(self, name: str, start_ns: int, end_ns: int, place: dict[str, Any]) -> None:
        """Note a span; it is written by ``flush``."""
        self._spans.append(Span(name, start_ns, end_ns, place))

    def flush(self) -> None:
        """Write what was noted. On a full disk the trace ends, not the work."""
        spans, self._spans = self._spans, []
        if self._file is None or not spans:
            return
        try:
            self._write("".join(",\n" + self._event(span) for span in spans))
            if self._size >= self._max_bytes:
                self._end_file()
                self._path.replace(self._path.with_name(f"previous-{self._path.name}"))
                self._begin_file()
        except OSError as err:
            logger.warning("%s: the trace ends: %s", self._worker, err)
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Write the rest and end the file."""
        self.flush()
        if self._file is not None:
            self._end_file()

    def _begin_file(self) -> None:
        self._file = io.FileIO(self._path, "w")
        self._size = 0
        # A process of the viewer is a worker; its data thread is the one thread in it.
        named = {"ph": "M", "pid": os.getpid(), "tid": threading.get_native_id()}
        names = [
            {**named, "name": kind, "args": {"name": self._worker}}
            for kind in ("process_name", "thread_name")
        ]
        self._write("[\n" + ",\n".join(map(json.dumps, names)))

    def _end_file(self) -> None:
        assert self._file is not None
        self._write("\n]\n")
        self._file.close()
        self._file = None

    def _write(self, text: str) -> None:
        assert self._file is not None
        self._file.write(text.encode())
        self._size += len(text)

    def _event(self, span: Span) -> str:
        return json.dumps(
            {
                "ph": "X",
                "name": span.name,
                "cat": "step",
                "pid": os.getpid(),
                "tid": threading.get_native_id(),
                "ts": span.start_ns / 1000,
                "dur": (span.end_ns - span.start_ns) / 1000,
                "args": span.place,
            }
        )


now_ns = time.monotonic_ns
