"""Writes a timeline of a worker's steps as Chrome trace events, for viewers such as Perfetto.

Every worker writes a file of its own; open the files of all workers together. Times are from
CLOCK_MONOTONIC, which all processes of a host share. The JSON array is closed when the worker ends;
viewers also accept an unclosed array.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from cluster.config.observability import ObservabilitySection
from cluster.core.errors import ConfigError
from cluster.disk.files import RecordFile
from workers.requests.step_header import StepHeader

logger = logging.getLogger(__name__)

SUFFIX = ".trace.json"
_OPEN = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC


class StepTrace:
    """``TimingSink`` that writes the timings of one worker. Data thread only.

    At most two files exist: a file that reaches ``max_bytes`` replaces the previous one.
    """

    def __init__(self, folder: Path, worker: str, max_bytes: int) -> None:
        """Create a file. Raises ``ConfigError`` if ``folder`` is not writable."""
        self._worker = worker
        self._max_bytes = max_bytes
        self._path = folder / f"{worker}-{os.getpid()}{SUFFIX}"
        self._events: list[str] = []
        self._fd: int | None = None
        self._records: RecordFile
        self._is_refused = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._begin_file()
        except OSError as err:
            raise ConfigError("trace_dir", str(folder), f"must be writable ({err})") from err

    @classmethod
    def of(cls, section: ObservabilitySection, worker: str) -> StepTrace | None:
        """The configured trace, or None without one. Raises ``ConfigError``."""
        if section.trace_dir is None:
            return None
        return cls(Path(section.trace_dir), worker, section.trace_max_bytes)

    def fork(self) -> StepTrace:
        return self

    def begin_step(self, header: StepHeader) -> bool:
        return True

    def add(self, name: str, start_ns: int, end_ns: int, labels: dict[str, Any]) -> None:
        """Queue a timing as an event, which ``flush`` writes."""
        event = {
            "ph": "X",
            "name": name,
            "cat": "step",
            "pid": os.getpid(),
            "tid": threading.get_native_id(),
            "ts": start_ns / 1000,
            "dur": (end_ns - start_ns) / 1000,
            "args": labels,
        }
        self._events.append(f",\n{json.dumps(event)}")

    def flush(self) -> None:
        """Write the queued events; drop them if the write fails."""
        events, self._events = self._events, []
        if not events:
            return
        try:
            if self._fd is not None and self._records.num_bytes >= self._max_bytes:
                self._path.replace(self._path.with_name(f"previous-{self._path.name}"))
                self._end_file()
            if self._fd is None:
                self._begin_file()
            self._records.append("".join(events).encode())
        except OSError as err:
            if not self._is_refused:  # log only once until a write succeeds
                logger.warning("%s: could not write steps to the trace: %s", self._worker, err)
            self._is_refused = True
        else:
            self._is_refused = False

    def close(self) -> None:
        self.flush()
        if self._fd is not None:
            with contextlib.suppress(OSError):
                self._end_file()

    def _begin_file(self) -> None:
        # A viewer shows a worker as a process with one thread, the data thread.
        named = {"ph": "M", "pid": os.getpid(), "tid": threading.get_native_id()}
        names = [
            {**named, "name": kind, "args": {"name": self._worker}}
            for kind in ("process_name", "thread_name")
        ]
        self._fd = os.open(self._path, _OPEN, 0o644)
        self._records = RecordFile(self._fd)
        try:
            self._records.append(("[\n" + ",\n".join(map(json.dumps, names))).encode())
        except OSError:
            self._close_fd()
            raise

    def _end_file(self) -> None:
        try:
            self._records.append(b"\n]\n")
        finally:
            self._close_fd()

    def _close_fd(self) -> None:
        assert self._fd is not None
        fd, self._fd = self._fd, None
        os.close(fd)
