"""Files and batches in the state folder, and the work on batches that have not ended.

    work/<batch>.json       names the batch's tenant; there until the batch has ended
    work/<batch>.requests   the requests, as they were when the batch was made
    work/<batch>.answers    answers so far; whoever has it open runs the batch (``flock(2)``)
    work/<batch>.failures   answers that are no success
    work/<batch>.cancel     the batch shall end

All calls block, and are for threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import msgspec

from gateway.batches.objects import (
    BATCHES,
    ENDED,
    FILES,
    MAX_FACTS_BYTES,
    WINDOW_S,
    Batch,
    FileFacts,
    FilePurpose,
    decode_batch,
    decode_file,
    encode_file,
)
from gateway.core.errors import KeyFullError, StorageError
from gateway.state.files import as_storage_error
from gateway.state.reader import StoredReader
from gateway.state.store import StateStore

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

_ENTRY, _REQUESTS, _ANSWERS, _FAILURES, _CANCEL = (
    ".json",
    ".requests",
    ".answers",
    ".failures",
    ".cancel",
)
_PARTS = (_REQUESTS, _ANSWERS, _FAILURES, _CANCEL)
_PIECE_BYTES = 1024 * 1024
_ABANDONED_S = 3600.0
"""Age at which parts of a batch without an entry are of one that was never made, or has ended;
and an entry without a batch, too."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that has not ended."""

    batch_id: str
    tenant: str


class BatchShelf:
    """See the module. Raises ``StorageError`` for whatever the file system refuses.

    Args:
        state: where objects are.
        clock: Unix time in seconds.
    """

    def __init__(self, state: StateStore, clock: Callable[[], float] = time.time) -> None:
        self._state = state
        self._clock = clock

    def put_file(
        self,
        tenant: str,
        filename: str,
        content: bytes,
        *,
        ttl_s: float | None = None,
    ) -> tuple[str, FileFacts]:
        """Store a file. Returns its id and facts. Raises ``StorageFullError``."""
        file_id = self._state.new_id(FILES)
        facts = self._facts(filename, "batch", len(content), ttl_s)
        self._state.put(FILES, tenant, file_id, encode_file(facts, content), ttl_s)
        return file_id, facts

    def put_output(
        self, tenant: str, filename: str, path: Path, file_id: str, ttl_s: float | None
    ) -> None:
        """Store the answers in a file at ``path``, which is read in pieces, and not at all where
        they have no room. Raises ``StorageFullError``."""
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

    def open_file(self, tenant: str, file_id: str) -> tuple[FileFacts, StoredReader] | None:
        """Facts, and a reader of the content, which is to be closed; None where the tenant has no
        such file."""
        reader = self._state.open_reader(FILES, tenant, file_id)
        if reader is None:
            return None
        try:
            return decode_file(reader.read_line(MAX_FACTS_BYTES), file_id)[0], reader
        except BaseException:
            reader.close()
            raise

    def get_file(self, tenant: str, file_id: str) -> tuple[FileFacts, bytes] | None:
        """Facts and content; None where the tenant has no such file."""
        found = self._state.get(FILES, tenant, file_id)
        return None if found is None else decode_file(found.content, file_id)

    def get_facts(self, tenant: str, file_id: str) -> FileFacts | None:
        """What is known of a file beside its content."""
        found = self._state.begin_of(FILES, tenant, file_id, MAX_FACTS_BYTES)
        return None if found is None else decode_file(found, file_id)[0]

    def delete_file(self, tenant: str, file_id: str) -> bool:
        """Whether there was one."""
        return self._state.delete(FILES, tenant, file_id)

    def list_files(self, tenant: str) -> list[str]:
        """Ids of a tenant's files, the oldest first."""
        return self._state.list_ids(FILES, tenant)

    def new_batch_id(self) -> str:
        """Id of a new batch."""
        return self._state.new_id(BATCHES)

    def new_file_id(self) -> str:
        """Id of a file that is stored later."""
        return self._state.new_id(FILES)

    def make(self, tenant: str, batch: Batch, requests: bytes) -> None:
        """Store a new batch, to be run. Raises ``StorageFullError``.

        Killed at any time, this leaves no batch that nobody runs.
        """
        self._check_room(tenant, len(requests))
        try:
            self._state.write_work(batch.id + _REQUESTS, requests)
            entry = Work(batch_id=batch.id, tenant=tenant)
            self._state.write_work(batch.id + _ENTRY, msgspec.json.encode(entry))
            self.save(tenant, batch)
        except StorageError:
            with contextlib.suppress(StorageError, OSError):
                self._state.delete(BATCHES, tenant, batch.id)  # it may be there, and not be synced
                self.end(batch.id)
            raise

    def _check_room(self, tenant: str, size: int) -> None:
        """Raise ``StorageFullError`` unless so much more may wait of this tenant."""
        for work in self.waiting():
            if work.tenant == tenant:
                with contextlib.suppress(FileNotFoundError):
                    size += self.requests(work.batch_id).stat().st_size
        if size > self.max_bytes:
            raise KeyFullError(
                f"the requests of this key's batches that have not ended would have {size} bytes, "
                f"the limit is {self.max_bytes}: wait until some have ended, or cancel them"
            )

    @property
    def max_bytes(self) -> int:
        """Of a tenant's files, and of requests that wait."""
        return self._state.max_bytes

    def save(self, tenant: str, batch: Batch) -> None:
        """Store how a batch is now: for whoever runs it. Raises ``StorageFullError``."""
        ttl_s = self._state.ttl_s + (0 if batch.status in ENDED else WINDOW_S)
        self._state.put(BATCHES, tenant, batch.id, msgspec.json.encode(batch), ttl_s)

    def get(self, tenant: str, batch_id: str) -> Batch | None:
        """A batch; None where the tenant has no such one."""
        found = self._state.get(BATCHES, tenant, batch_id)
        if found is None:
            return None
        batch = decode_batch(found.content, batch_id)
        if batch.status in ENDED:
            return batch
        with contextlib.suppress(FileNotFoundError):
            asked_s = self._part(batch_id, _CANCEL).stat().st_mtime
            return msgspec.structs.replace(batch, status="cancelling", cancelling_at=int(asked_s))
        return batch

    def list_batches(self, tenant: str) -> list[str]:
        """Ids of a tenant's batches, the oldest first."""
        return self._state.list_ids(BATCHES, tenant)

    def cancel(self, batch_id: str) -> None:
        """Ask whoever runs a batch to end it."""
        if self._part(batch_id, _ENTRY).exists():
            self._state.write_work(batch_id + _CANCEL, b"")

    def is_cancelled(self, batch_id: str) -> bool:
        """Whether it shall end."""
        return self._part(batch_id, _CANCEL).exists()

    def waiting(self) -> list[Work]:
        """Batches that have not ended, the oldest first; others may be running them."""
        found = []
        for path in sorted(self._state.work.glob(f"*{_ENTRY}")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Work))
            except FileNotFoundError:
                continue
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as err:
                logger.error("the batch of %s cannot be run: %s", path.name, err)
        return found

    def is_waiting(self, batch_id: str) -> bool:
        """Whether the batch has not ended."""
        return self._part(batch_id, _ENTRY).exists()

    def take(self, work: Work) -> Batch | None:
        """The batch of an entry, for the process that has its file of answers open.

        None where it has just ended, is being made, or has expired by the clock of this gateway
        alone. An entry whose batch is gone is removed.
        """
        if not self.is_waiting(work.batch_id):
            return None
        batch = self.get(work.tenant, work.batch_id)
        is_there = batch is not None or self._state.has_file(BATCHES, work.tenant, work.batch_id)
        if not is_there and self._age_s(work.batch_id) >= _ABANDONED_S:
            self.end(work.batch_id)
        return batch

    def is_over(self, batch: Batch) -> bool:
        """Whether a batch is to end though requests are left."""
        return self.is_cancelled(batch.id) or self.has_expired(batch)

    def has_expired(self, batch: Batch) -> bool:
        """Whether the time of a batch is over, also by the clock of the file system."""
        window_s = batch.expires_at - batch.created_at
        return self._clock() >= batch.expires_at and self._age_s(batch.id) >= window_s

    def _age_s(self, batch_id: str) -> float:
        """Time since a batch was made, by the clock of the file system; 0.0 without an entry."""
        with contextlib.suppress(FileNotFoundError):
            made_s = self._part(batch_id, _ENTRY).stat().st_mtime
            return self._state.disk_time_s() - made_s
        return 0.0

    def requests(self, batch_id: str) -> Path:
        """The requests of a batch that has not ended."""
        return self._part(batch_id, _REQUESTS)

    def answers(self, batch_id: str) -> Path:
        """Its answers so far."""
        return self._part(batch_id, _ANSWERS)

    def failures(self, batch_id: str) -> Path:
        """Its answers so far that are no success."""
        return self._part(batch_id, _FAILURES)

    def end(self, batch_id: str) -> None:
        """Remove the work on a batch, whose end is stored."""
        for part in (_ENTRY, *_PARTS):
            self._part(batch_id, part).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove parts that have no entry: their makers were killed."""
        self._state.require_open()
        left = [path for path in self._state.work.iterdir() if path.suffix in _PARTS]
        left = [path for path in left if not self.is_waiting(path.stem)]
        if not left:
            return
        before_s = self._state.disk_time_s() - _ABANDONED_S
        for path in left:
            if not self.is_waiting(path.stem):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < before_s:
                        path.unlink()

    def _part(self, batch_id: str, part: str) -> Path:
        return self._state.work / f"{batch_id}{part}"


def readable(read: Callable[[str, str], Found | None], tenant: str, object_id: str) -> Found | None:
    """What ``read`` returns; None, and a line in the log, for a damaged object."""
    try:
        return read(tenant, object_id)
    except StorageError as err:
        logger.error("%s is left out of a list: %s", object_id, err)
        return None
