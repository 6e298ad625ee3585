"""Reads a stored object in pieces, with only one piece in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

from gateway.core.errors import StorageError
from gateway.state.files import as_storage_error
from gateway.state.record import MAX_HEAD_BYTES, decode_head


class StoredReader:
    """Reads the content of an object sequentially. All calls block; call in a thread.

    The content is checked when its last piece is read, after all other pieces were returned. A
    reader must be closed, by ``close`` or a ``with`` block.
    """

    def __init__(self, place: Path, object_id: str) -> None:
        """Open the file. Raises ``OSError``, and ``StorageError`` if its first line is damaged."""
        self._file = place.open("rb")
        self._digest = hashlib.sha256()
        self._damage = f"the stored object {object_id} is damaged"
        try:
            self.head = decode_head(self._file.readline(MAX_HEAD_BYTES))
            """Metadata of the object."""
            if self.head.id != object_id:
                raise StorageError(self._damage)
        except BaseException:
            self._file.close()
            raise
        self.num_left = self.head.size
        """Number of bytes that have not been read yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def read(self, num_bytes: int) -> bytes:
        """Return up to ``num_bytes`` bytes; empty at the end. Raises ``StorageError``."""
        with as_storage_error():
            return self._check_piece(self._file.read(min(num_bytes, self.num_left)), num_bytes)

    def read_line(self, max_bytes: int) -> bytes:
        """Return the next line, or its first ``max_bytes``. Raises ``StorageError``."""
        with as_storage_error():
            return self._check_piece(self._file.readline(min(max_bytes, self.num_left)), max_bytes)

    def _check_piece(self, piece: bytes, num_bytes: int) -> bytes:
        self._digest.update(piece)
        self.num_left -= len(piece)
        is_cut = not piece and num_bytes > 0 and self.num_left
        is_end = not self.num_left
        if is_cut or (is_end and (self._file.read(1) or not self._is_as_stored)):
            raise StorageError(self._damage)
        return piece

    @property
    def _is_as_stored(self) -> bool:
        return self._digest.hexdigest() == self.head.sha256
