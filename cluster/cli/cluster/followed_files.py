"""Reads log files while other processes write and rotate them."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import BinaryIO


class FollowedFile:
    """Reader of one growing log file; after a rotation, it continues with the new file.

    The old file stays open, so that text written before the rotation is not lost. Must be closed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __enter__(self) -> FollowedFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self) -> str:
        """Return the text since the last call; invalid bytes become U+FFFD. Does not block."""
        newest = self._open_newest()
        data = self._read_rest()
        if newest is not None:
            self.__exit__()
            self._file = newest
            data += self._read_rest()
        return self._decoder.decode(data)

    def _open_newest(self) -> BinaryIO | None:
        """Open the file that now has the path; None if it is open already or does not exist."""
        try:
            found = self._path.open("rb")
        except FileNotFoundError:
            return None  # the next file is about to be created
        if self._file is None or not os.path.sameopenfile(self._file.fileno(), found.fileno()):
            return found
        found.close()
        return None

    def _read_rest(self) -> bytes:
        if self._file is None:
            return b""
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            self._file.seek(0)  # the file was truncated
        return self._file.read()
