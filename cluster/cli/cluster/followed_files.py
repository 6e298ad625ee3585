"""Log files that are read while others write, and rotate, them."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import BinaryIO


class FollowedFile:
    """Text of one file, as it grows. A file that replaces it under its name is read after it.

    The file stays open: what was written before a rotation is found after it, too. Close it.
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
        """The text since the last call; invalid bytes become U+FFFD. Never waits for more."""
        newest = self._newest()
        data = self._rest()
        if newest is not None:
            self.__exit__()
            self._file = newest
            data += self._rest()
        return self._decoder.decode(data)

    def _newest(self) -> BinaryIO | None:
        """The file that has the name now; None where that is the open one, or there is none."""
        try:
            found = self._path.open("rb")
        except FileNotFoundError:
            return None  # the next one is about to come
        if self._file is None or not os.path.sameopenfile(self._file.fileno(), found.fileno()):
            return found
        found.close()
        return None

    def _rest(self) -> bytes:
        if self._file is None:
            return b""
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            self._file.seek(0)  # it was emptied
        return self._file.read()
