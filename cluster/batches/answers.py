"""The answers of a batch, in a file that grows: what it has survives a kill at any time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from cluster.core.errors import ConflictError

LINE_ID = "batch_req_"
"""Begins the id of an answer, with which its line begins."""
_BEGIN = f'{{"id": "{LINE_ID}'.encode()


class InUseError(ConflictError):
    """Another process has the file open."""


class AnswerFile:
    """Lines with the answers to requests, of which each has one at most.

    A line is written as a whole or, after a kill or with a full disk, in part; a part at the end is
    cut off when the file is opened again. One process at a time has it open (``flock(2)``).
    """

    def __init__(self, path: Path) -> None:
        """Opens or makes the file.

        Raises:
            InUseError: another process has it.
            ConflictError: it is not a file of answers, or damaged; it stays as it is.
            OSError: it cannot be written.
        """
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.done = set[str]()
        """The requests, by their ids, that have an answer."""
        self.num_failed = 0
        """Answers that are no success."""
        self.num_bytes = 0
        """Of all answers."""
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, custom_id: str, line: Mapping[str, Any]) -> None:
        """Add an answer. Raises ``OSError``: the file is as before, or has a part of it."""
        assert custom_id not in self.done, custom_id
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        raw = text.encode(errors="backslashreplace") + b"\n"  # half a surrogate pair as an escape
        left = memoryview(raw)
        while left:
            left = left[os.write(self._fd, left) :]
        self.num_bytes += len(raw)
        self._note(custom_id, line)

    def sync(self) -> None:
        """Wait until what was added is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Sync, and let others open the file."""
        with contextlib.suppress(OSError):
            self.sync()
        os.close(self._fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise InUseError(f"{self._path.name} is being written by another process") from err

    def _read(self) -> None:
        """Note the answers; cut off a part of a line at the end."""
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._check_part(line, number)
                    break
                found = _answer_in(line)
                if found is None or found["custom_id"] in self.done:
                    rule = "is no answer" if found is None else "answers a request again"
                    raise ConflictError(f"{self._path.name}: line {number} {rule}")
                self._note(found["custom_id"], found)
                self.num_bytes += len(line)
        os.ftruncate(self._fd, self.num_bytes)

    def _check_part(self, line: bytes, number: int) -> None:
        """Raise ``ConflictError`` unless a line without an end is the begin of an answer.

        Zeros behind it are what some file systems leave when a machine fails.
        """
        part = line.rstrip(b"\0")
        if not (part.startswith(_BEGIN) or _BEGIN.startswith(part)):
            raise ConflictError(f"{self._path.name}: line {number} is no answer")

    def _note(self, custom_id: str, line: Mapping[str, Any]) -> None:
        self.done.add(custom_id)
        self.num_failed += not is_success(line["response"]["status_code"])


def is_success(status: int) -> bool:
    """Whether an HTTP status says that a request was served."""
    return 200 <= status < 300


def _answer_in(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
        is_answer = isinstance(found["custom_id"], str) and isinstance(
            found["response"]["status_code"], int
        )
    except (ValueError, KeyError, TypeError):
        return None
    return found if is_answer else None
