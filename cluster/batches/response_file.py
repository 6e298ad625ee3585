"""Append-only file of a batch's responses; survives disk errors and killed processes."""

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
"""Prefix of a response's id; the id is the first value of the response's JSON line."""
_BEGIN = f'{{"id": "{LINE_ID}'.encode()
_OPEN = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_PROBE_BYTES = 64 * 1024
_MAX_BEGINS = 8
"""Maximum number of positions in a damaged line at which a response is searched."""


class InUseError(ConflictError):
    """Another process has the response file open."""


class ResponseFile:
    """File of response lines, at most one for each request.

    After a failed write, the file is truncated to its whole lines. When the file is opened, a
    partial line that a killed process left is removed; whole lines stay. Lines that are not synced
    yet also stay in memory and are written again if a sync fails. Only one process can have the
    file open at a time (``flock(2)``).
    """

    def __init__(self, path: Path, *, is_private: bool = False) -> None:
        """Open or create the file.

        Args:
            path: path of the file.
            is_private: whether only this class writes the file. If so, every line without a new
                response is damage, which is removed. Otherwise only a partial response is damage.

        Raises:
            InUseError: another process has the file open.
            ConflictError: a line is no response or repeats one; the file is left unchanged.
            OSError: the file cannot be read or repaired; it keeps all its responses.
        """
        self._path = path
        self._is_private = is_private
        self._fd = os.open(path, _OPEN, 0o644)
        self.answered_ids = set[str]()
        """The ``custom_id`` of each request that has a response in the file."""
        self.num_failed = 0
        """Number of responses in the file with an HTTP status other than 2xx."""
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
        """Size of all responses in the file, in bytes."""
        return self._records.num_bytes

    def append(self, custom_id: str, line: Mapping[str, Any]) -> None:
        """Append the response to request ``custom_id``.

        After an ``OSError`` the file has only the earlier responses.
        """
        assert custom_id not in self.answered_ids, custom_id
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        raw = text.encode(errors="backslashreplace") + b"\n"  # escapes lone surrogates
        self._write_doubtful()
        self._records.append(raw)
        self._unsynced.append(raw)
        self._record(custom_id, line)

    def check_disk_space(self) -> None:
        """Raise ``OSError`` if the disk has no space for more responses."""
        self._write_doubtful()
        before = self.num_bytes
        self._records.append(bytes(_PROBE_BYTES))  # the next opening removes zeros at the end
        self._records.truncate(before)

    def sync(self) -> None:
        """Wait until all responses are on disk. After an ``OSError`` a later call tries again."""
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
        """Sync the file, ignoring errors, and close it; other processes may then open it."""
        with contextlib.suppress(OSError):
            self.sync()
        os.close(self._fd)

    def _lock(self, fd: int) -> None:
        """Lock the file. Raises ``InUseError`` if another process has locked or replaced it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(fd), os.stat(self._path))
        except (BlockingIOError, FileNotFoundError):
            is_there = False
        if not is_there:
            raise InUseError(f"{self._path.name} is being written by another process")

    def _read(self) -> Iterator[_Line]:
        """Read and record the responses in the file; yield the position of each.

        Raises ``ConflictError`` if a line is neither a new response nor damage.
        """
        with open(self._fd, "rb", closefd=False) as file:
            begin = 0
            for number, raw in enumerate(file, 1):
                found = _response_in(raw)
                if found is not None and found.response["custom_id"] in self.answered_ids:
                    if not self._is_private:
                        raise ConflictError(
                            f"{self._path.name}: line {number} repeats the response to a request"
                        )
                    found = None
                if not self._is_private and (found is None or found.begin) and not _is_partial(raw):
                    raise ConflictError(f"{self._path.name}: line {number} is no answer")
                if found is not None:
                    self._record(found.response["custom_id"], found.response)
                    yield _Line(begin + found.begin, len(raw) - found.begin)
                begin += len(raw)

    def _repair(self, lines: list[_Line]) -> None:
        """Remove everything except the ``lines`` from the file. Raises ``OSError``."""
        num_bytes = sum(line.num_bytes for line in lines)
        if lines and lines[-1].end != num_bytes:
            logger.warning("repairing %s, which has damaged lines", self._path.name)
            self._rewrite(lines)
        self._records.truncate(num_bytes)

    def _rewrite(self, lines: list[_Line]) -> None:
        """Replace the file atomically with a file that has only the ``lines`` of this file."""
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
        """Rewrite lines that a failed sync may have lost; a later sync would not report that."""
        if self._is_doubtful:
            self._records.truncate(self._num_synced_bytes)
            self._records.append(b"".join(self._unsynced))
            self._is_doubtful = False

    def _record(self, custom_id: str, line: Mapping[str, Any]) -> None:
        self.answered_ids.add(custom_id)
        self.num_failed += not is_success(line["response"]["status_code"])


@dataclass(frozen=True, slots=True)
class _Line:
    """Position of a response in the response file, in bytes."""

    begin: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.begin + self.num_bytes


@dataclass(frozen=True, slots=True)
class _LineResponse:
    """Response at the end of a line of the response file."""

    begin: int
    """Number of bytes in the line before the response."""
    response: dict[str, Any]


def is_success(status: int) -> bool:
    """Return whether an HTTP status means success."""
    return 200 <= status < 300


def _is_partial(line: bytes) -> bool:
    """Return whether a line is the beginning of a response that was not written completely.

    Trailing zeros are ignored, because some file systems leave them when a machine fails.
    """
    part = line.rstrip(b"\0")
    return part.startswith(_BEGIN) or (_BEGIN.startswith(part) and not line.endswith(b"\n"))


def _response_in(line: bytes) -> _LineResponse | None:
    """Return the response at the end of a line, or None if there is none.

    Part of another response may precede it in the line.
    """
    if not line.endswith(b"\n"):
        return None
    begin = 0
    for _ in range(_MAX_BEGINS):
        if (answer := _parsed(line[begin:])) is not None:
            return _LineResponse(begin, answer)
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
