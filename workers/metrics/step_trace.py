"""A timeline of a worker's steps in a file: Chrome trace events, which Perfetto opens.

Every worker writes its own file; open the files of all workers together. Times are those of
CLOCK_MONOTONIC, which all processes of a host share. The JSON array is closed when the worker
ends; viewers accept an open one.
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from cluster.config.cluster import ObservabilitySection
from cluster.core.errors import ConfigError
from workers.requests.step_header import StepHeader

logger = logging.getLogger(__name__)

SUFFIX = ".trace.json"


class StepTrace:
    """``TimingSink`` that writes the timings of one worker. Data thread only.

    There are at most two files: one that reaches ``max_bytes`` replaces the previous one.
    """

    def __init__(self, folder: Path, worker: str, max_bytes: int) -> None:
        """Begin a file. Raises ``ConfigError`` when ``folder`` is not writable."""
        self._worker = worker
        self._max_bytes = max_bytes
        self._path = folder / f"{worker}-{os.getpid()}{SUFFIX}"
        self._events: list[str] = []
        self._size = 0
        self._file: io.FileIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._begin_file()
        except OSError as err:
            raise ConfigError("trace_dir", str(folder), f"must be writable ({err})") from err

    @classmethod
    def of(cls, section: ObservabilitySection, worker: str) -> StepTrace | None:
        """The trace that the configuration asks for, if any. Raises ``ConfigError`` as above."""
        if section.trace_dir is None:
            return None
        return cls(Path(section.trace_dir), worker, section.trace_max_bytes)

    def begin_step(self, header: StepHeader) -> bool:
        return True

    def add(self, name: str, start_ns: int, end_ns: int, place: dict[str, Any]) -> None:
        """Keep a timing as an event; ``flush`` writes it."""
        event = {
            "ph": "X",
            "name": name,
            "cat": "step",
            "pid": os.getpid(),
            "tid": threading.get_native_id(),
            "ts": start_ns / 1000,
            "dur": (end_ns - start_ns) / 1000,
            "args": place,
        }
        self._events.append(f",\n{json.dumps(event)}")

    def flush(self) -> None:
        """Write the events so far. A full disk ends the trace, not the work."""
        events, self._events = self._events, []
        if self._file is None or not events:
            return
        try:
            self._write("".join(events))
            if self._size >= self._max_bytes:
                self._end_file()
                self._path.replace(self._path.with_name(f"previous-{self._path.name}"))
                self._begin_file()
        except OSError as err:
            logger.warning("%s: the trace ends: %s", self._worker, err)
            if self._file is not None:
                self._file.close()
            self._file = None

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._end_file()

    def _begin_file(self) -> None:
        self._file = io.FileIO(self._path, "w")
        self._size = 0
        # A viewer shows a worker as a process with one thread, the data thread.
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
