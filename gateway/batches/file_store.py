"""Stores input and output files in the state folder. All methods block; call them in threads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

from gateway.batches.objects import (
    FILES,
    MAX_FACTS_BYTES,
    FileFacts,
    FilePurpose,
    decode_file,
    encode_file,
)
from gateway.state.files import as_storage_error
from gateway.state.reader import StoredReader
from gateway.state.store import StateStore

_PIECE_BYTES = 1024 * 1024


class FileStore:
    """Stores the files of tenants. Methods raise ``StorageError`` for errors of the file system.

    Args:
        state: store of objects.
        clock: Unix time in seconds.
    """

    def __init__(self, state: StateStore, clock: Callable[[], float] = time.time) -> None:
        self._state = state
        self._clock = clock

    @property
    def max_bytes(self) -> int:
        """Maximum total size in bytes of a tenant's files."""
        return self._state.max_bytes

    def new_id(self) -> str:
        """Make the id of a new file."""
        return self._state.new_id(FILES)

    def put(
        self, tenant: str, filename: str, content: bytes, *, ttl_s: float | None = None
    ) -> tuple[str, FileFacts]:
        """Store a file; return its id and metadata. Raises ``StorageFullError``."""
        file_id = self.new_id()
        facts = self._facts(filename, "batch", len(content), ttl_s)
        self._state.put(FILES, tenant, file_id, encode_file(facts, content), ttl_s)
        return file_id, facts

    def put_output(
        self, tenant: str, filename: str, path: Path, file_id: str, ttl_s: float | None
    ) -> None:
        """Store the file at ``path`` as an output file: check its size, then copy it in pieces.
        Raises ``StorageFullError``."""
        with as_storage_error(), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            facts = self._facts(filename, "batch_output", size, ttl_s)
            head = encode_file(facts, b"")
            pieces = chain([head], iter(partial(file.read, _PIECE_BYTES), b""))
            self._state.put_pieces(FILES, tenant, file_id, len(head) + size, pieces, ttl_s)

    def _facts(
        self, filename: str, purpose: FilePurpose, size: int, ttl_s: float | None
    ) -> FileFacts:
        now_s = self._clock()
        return FileFacts(
            filename=filename,
            purpose=purpose,
            bytes=size,
            created_at=int(now_s),
            expires_at=int(now_s + (self._state.ttl_s if ttl_s is None else ttl_s)),
        )

    def open(self, tenant: str, file_id: str) -> tuple[FileFacts, StoredReader] | None:
        """Return metadata and a reader of the content, which the caller must close; None if the
        tenant has no such file."""
        reader = self._state.open_reader(FILES, tenant, file_id)
        if reader is None:
            return None
        try:
            return decode_file(reader.read_line(MAX_FACTS_BYTES), file_id)[0], reader
        except BaseException:
            reader.close()
            raise

    def get(self, tenant: str, file_id: str) -> tuple[FileFacts, bytes] | None:
        """Return metadata and content; None if the tenant has no such file."""
        stored = self._state.get(FILES, tenant, file_id)
        return None if stored is None else decode_file(stored.content, file_id)

    def facts(self, tenant: str, file_id: str) -> FileFacts | None:
        """Return the metadata of a file; None if the tenant has no such file."""
        begin = self._state.read_prefix(FILES, tenant, file_id, MAX_FACTS_BYTES)
        return None if begin is None else decode_file(begin, file_id)[0]

    def delete(self, tenant: str, file_id: str) -> bool:
        """Delete a file; return whether it existed."""
        return self._state.delete(FILES, tenant, file_id)

    def list_ids(self, tenant: str) -> list[str]:
        """Ids of a tenant's files, oldest first."""
        return self._state.list_ids(FILES, tenant)
