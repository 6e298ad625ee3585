"""The answers of a batch, in a file that grows: they survive errors of the disk and kills."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster.core.errors import ConflictError
from cluster.disk.files import RecordFile, sync_folder, write_all

logger = logging.getLogger(__name__)

LINE_ID = "batch_req_"
"""Begins the id of an answer, with which its line begins."""
_BEGIN = f'{{"id": "{LINE_ID}'.encode()
_OPEN = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_PROBE_BYTES = 64 * 1024
_MAX_BEGINS = 8
"""Places in a damaged line at which an answer is looked for."""


class InUseError(ConflictError):
    """Another process has the file open."""


class AnswerFile:
    """Lines with the answers to requests, of which each has one at most.

    After an error the file is cut to its whole lines. What a killed process left is repaired when
    the file is opened again: a part of a line is removed, each whole line stays. Lines that are not
    safe on the disk yet are also in memory, and are written again where a sync fails. One process
    at a time has the file open (``flock(2)``).
    """

    def __init__(self, path: Path, *, is_private: bool = False) -> None:
        """Opens or makes the file.

        Args:
            path: of the file.
            is_private: nothing but this class writes it, so that every line that is no answer is
                damage. Otherwise only parts of answers are.

        Raises:
            InUseError: another process has it.
            ConflictError: it is not a file of answers; it stays as it is.
            OSError: it cannot be read, or not be repaired; it has all its answers.
        """
        self._path = path
        self._is_private = is_private
        self._fd = os.open(path, _OPEN, 0o644)
        self.done = set[str]()
        """The requests, by their ids, that have an answer."""
        self.num_failed = 0
        """Answers that are no success."""
        try:
            self._lock(self._fd)
            lines = list(self._read())
            self._records = RecordFile(self._fd)
            self._repair(lines)
        except BaseException:
            os.close(self._fd)
            raise
        self._is_new = not lines
        self._num_synced_bytes = self.num_bytes
        self._unsynced: list[bytes] = []
        self._is_doubtful = False  # a sync failed: the disk may have lost the unsynced lines

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def num_bytes(self) -> int:
        """Size of all answers."""
        return self._records.num_bytes

    def append(self, custom_id: str, line: Mapping[str, Any]) -> None:
        """Add an answer. Raises ``OSError``: the file has the answers before it."""
        assert custom_id not in self.done, custom_id
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        raw = text.encode(errors="backslashreplace") + b"\n"  # half a surrogate pair as an escape
        self._write_doubtful()
        self._records.append(raw)
        self._unsynced.append(raw)
        self._note(custom_id, line)

    def check_room(self) -> None:
        """Raise ``OSError`` where the disk has no room for more answers."""
        self._write_doubtful()
        before = self.num_bytes
        self._records.append(
            bytes(_PROBE_BYTES)
        )  # zeros at the end are cut off by the next opening
        self._records.cut(before)

    def sync(self) -> None:
        """Wait until answers are on the disk. Raises ``OSError``: a later call tries again."""
        self._write_doubtful()
        if not self._unsynced:
            return
        try:
            os.fsync(self._fd)
        except OSError:
            self._is_doubtful = True
            raise
        if self._is_new:
            sync_folder(self._path.parent)
            self._is_new = False
        self._unsynced.clear()
        self._num_synced_bytes = self.num_bytes

    def close(self) -> None:
        """Sync, and let others open the file."""
        with contextlib.suppress(OSError):
            self.sync()
        os.close(self._fd)

    def _lock(self, fd: int) -> None:
        """Raise ``InUseError`` unless this process has the file at the path for itself."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(fd), os.stat(self._path))
        except (BlockingIOError, FileNotFoundError):
            is_there = False
        if not is_there:
            raise InUseError(f"{self._path.name} is being written by another process")

    def _read(self) -> Iterator[_Line]:
        """The answers in the file, noted as they are found. Raises ``ConflictError``."""
        with open(self._fd, "rb", closefd=False) as file:
            begin = 0
            for number, raw in enumerate(file, 1):
                found = _answer_in(raw)
                if found is not None and found.answer["custom_id"] in self.done:
                    if not self._is_private:
                        raise ConflictError(
                            f"{self._path.name}: line {number} answers a request again"
                        )
                    found = None
                if not self._is_private and (found is None or found.begin) and not _is_part(raw):
                    raise ConflictError(f"{self._path.name}: line {number} is no answer")
                if found is not None:
                    self._note(found.answer["custom_id"], found.answer)
                    yield _Line(begin + found.begin, len(raw) - found.begin)
                begin += len(raw)

    def _repair(self, lines: list[_Line]) -> None:
        """Remove from the file all but these lines. Raises ``OSError``."""
        num_bytes = sum(line.num_bytes for line in lines)
        if lines and lines[-1].end != num_bytes:
            logger.warning("%s is repaired: it has damaged lines", self._path.name)
            self._rewrite(lines)
        self._records.cut(num_bytes)

    def _rewrite(self, lines: list[_Line]) -> None:
        """Put a file with these lines in place of this one, which is whole until then."""
        path = Path(os.path.realpath(self._path))
        draft = path.with_name(f"{path.name}.new")
        fd = os.open(draft, _OPEN | os.O_TRUNC, os.fstat(self._fd).st_mode & 0o777)
        try:
            with open(self._fd, "rb", closefd=False) as file:
                for line in lines:
                    file.seek(line.begin)
                    write_all(fd, file.read(line.num_bytes))
            os.fsync(fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(draft, path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        old, self._fd = self._fd, fd
        self._records = RecordFile(fd)
        os.close(old)

    def _write_doubtful(self) -> None:
        """Write again what a failed sync may have lost: the disk forgets such errors."""
        if self._is_doubtful:
            self._records.cut(self._num_synced_bytes)
            self._records.append(b"".join(self._unsynced))
            self._is_doubtful = False

    def _note(self, custom_id: str, line: Mapping[str, Any]) -> None:
        self.done.add(custom_id)
        self.num_failed += not is_success(line["response"]["status_code"])


@dataclass(frozen=True, slots=True)
class _Line:
    """The place of an answer in the file."""

    begin: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.begin + self.num_bytes


@dataclass(frozen=True, slots=True)
class _Found:
    """The answer at the end of a line."""

    begin: int
    """Bytes before it."""
    answer: dict[str, Any]


def is_success(status: int) -> bool:
    """Whether an HTTP status says that a request was served."""
    return 200 <= status < 300


def _is_part(line: bytes) -> bool:
    """Whether a line without a whole answer begins as one does.

    Zeros behind it are what some file systems leave when a machine fails.
    """
    part = line.rstrip(b"\0")
    return part.startswith(_BEGIN) or (_BEGIN.startswith(part) and not line.endswith(b"\n"))


def _answer_in(line: bytes) -> _Found | None:
    """The answer in a line, which may have a part of another one before it."""
    if not line.endswith(b"\n"):
        return None
    begin = 0
    for _ in range(_MAX_BEGINS):
        if (answer := _parsed(line[begin:])) is not None:
            return _Found(begin, answer)
        begin = line.find(_BEGIN, begin + 1)
        if begin < 0:
            break
    return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
        is_answer = isinstance(found["custom_id"], str) and isinstance(
            found["response"]["status_code"], int
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if is_answer else None
