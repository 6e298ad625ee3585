"""Batches in the state folder, and the working files of unfinished batches.

    work/<batch>.json       the batch's tenant; exists until the batch has ended
    work/<batch>.requests   copy of the requests
    work/<batch>.answers    successful responses so far; the process that locks this file
                            (``flock(2)``) runs the batch
    work/<batch>.failures   failed responses so far
    work/<batch>.cancel     exists if the batch was cancelled

All methods block; call them in threads.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import msgspec

from gateway.batches.file_store import FileStore
from gateway.batches.objects import (
    BATCHES,
    ENDED,
    WINDOW_S,
    StoredBatch,
    decode_batch,
)
from gateway.core.errors import KeyFullError, StorageError
from gateway.state.store import StateStore

logger = logging.getLogger(__name__)

_ABANDONED_S = 3600.0
"""Seconds after which an entry without a batch, or working files without an entry, are removed."""


class WorkPart(StrEnum):
    """Suffixes of the working files."""

    ENTRY = ".json"
    REQUESTS = ".requests"
    ANSWERS = ".answers"
    FAILURES = ".failures"
    CANCEL = ".cancel"


class PendingBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Entry of an unfinished batch: the content of ``work/<batch>.json``."""

    batch_id: str
    tenant: str


class BatchStore:
    """Stores the batches of tenants and their working files.

    Methods raise ``StorageError`` for errors of the file system.

    Args:
        state: store of objects.
        clock: Unix time in seconds.
    """

    def __init__(self, state: StateStore, clock: Callable[[], float] = time.time) -> None:
        self._state = state
        self.files = FileStore(state, clock)
        """Input and output files of batches."""
        self._clock = clock

    def new_id(self) -> str:
        """Make the id of a new batch."""
        return self._state.new_id(BATCHES)

    def make(self, tenant: str, batch: StoredBatch, requests: bytes) -> None:
        """Store a new batch. Raises ``StorageFullError``.

        A stored batch will run even if this process is killed at any step.
        """
        self._check_limit(tenant, len(requests))
        try:
            self._state.write_work(batch.id + WorkPart.REQUESTS, requests)
            entry = PendingBatch(batch_id=batch.id, tenant=tenant)
            self._state.write_work(batch.id + WorkPart.ENTRY, msgspec.json.encode(entry))
            self.save(tenant, batch)
        except StorageError:
            with contextlib.suppress(StorageError, OSError):
                self._state.delete(BATCHES, tenant, batch.id)  # it may exist without being synced
                self.end(batch.id)
            raise

    def _check_limit(self, tenant: str, size: int) -> None:
        """Raise ``StorageFullError`` if ``size`` more bytes exceed the tenant's limit."""
        max_bytes = self._state.max_bytes
        for work in self.waiting():
            if work.tenant == tenant:
                with contextlib.suppress(FileNotFoundError):
                    size += self.path(work.batch_id, WorkPart.REQUESTS).stat().st_size
        if size > max_bytes:
            raise KeyFullError(
                f"the requests of this key's unfinished batches would have {size} bytes, "
                f"the limit is {max_bytes}: wait until some have ended, or cancel them"
            )

    def save(self, tenant: str, batch: StoredBatch) -> None:
        """Store the state of a batch that this gateway runs. Raises ``StorageFullError``."""
        ttl_s = self._state.ttl_s + (0 if batch.status in ENDED else WINDOW_S)
        self._state.put(BATCHES, tenant, batch.id, msgspec.json.encode(batch), ttl_s)

    def get(self, tenant: str, batch_id: str) -> StoredBatch | None:
        """Read a batch; None if the tenant has no batch with this id."""
        found = self._state.get(BATCHES, tenant, batch_id)
        if found is None:
            return None
        batch = decode_batch(found.content, batch_id)
        if batch.status in ENDED:
            return batch
        with contextlib.suppress(FileNotFoundError):
            asked_s = self.path(batch_id, WorkPart.CANCEL).stat().st_mtime
            return msgspec.structs.replace(batch, status="cancelling", cancelling_at=int(asked_s))
        return batch

    def list_ids(self, tenant: str) -> list[str]:
        """Ids of a tenant's batches, oldest first."""
        return self._state.list_ids(BATCHES, tenant)

    def cancel(self, batch_id: str) -> None:
        """Request the gateway that runs a batch to cancel it."""
        if self.path(batch_id, WorkPart.ENTRY).exists():
            self._state.write_work(batch_id + WorkPart.CANCEL, b"")

    def is_cancelled(self, batch_id: str) -> bool:
        """Whether a batch was cancelled."""
        return self.path(batch_id, WorkPart.CANCEL).exists()

    def waiting(self) -> list[PendingBatch]:
        """Unfinished batches, oldest first, including batches that other gateways run."""
        found = []
        for path in sorted(self._state.work.glob(f"*{WorkPart.ENTRY}")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=PendingBatch))
            except FileNotFoundError:
                continue
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as err:
                logger.error("could not read the batch entry %s: %s", path.name, err)
        return found

    def is_pending(self, batch_id: str) -> bool:
        """Whether the batch has not ended."""
        return self.path(batch_id, WorkPart.ENTRY).exists()

    def take(self, work: PendingBatch) -> StoredBatch | None:
        """Read the batch of an entry. The caller must have locked the batch's file of responses.

        Returns None if the batch has ended, is still being created, or is past its retention by
        this gateway's clock. Removes an old entry of a batch that does not exist.
        """
        if not self.is_pending(work.batch_id):
            return None
        batch = self.get(work.tenant, work.batch_id)
        is_there = batch is not None or self._state.has_file(BATCHES, work.tenant, work.batch_id)
        if not is_there and self._age_s(work.batch_id) >= _ABANDONED_S:
            self.end(work.batch_id)
        return batch

    def must_end(self, batch: StoredBatch) -> bool:
        """Whether a batch was cancelled or has expired, and so must end before all requests ran."""
        return self.is_cancelled(batch.id) or self.has_expired(batch)

    def has_expired(self, batch: StoredBatch) -> bool:
        """Whether a batch has expired by both clocks, this gateway's and the file system's."""
        window_s = batch.expires_at - batch.created_at
        return self._clock() >= batch.expires_at and self._age_s(batch.id) >= window_s

    def _age_s(self, batch_id: str) -> float:
        """Age of a batch by the clock of the file system; 0.0 without an entry."""
        with contextlib.suppress(FileNotFoundError):
            made_s = self.path(batch_id, WorkPart.ENTRY).stat().st_mtime
            return self._state.disk_time_s() - made_s
        return 0.0

    def end(self, batch_id: str) -> None:
        """Remove the working files of a batch that has ended or was not stored."""
        for part in WorkPart:
            self.path(batch_id, part).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove old working files without an entry, left behind by killed processes."""
        self._state.require_open()
        parts = set(WorkPart) - {WorkPart.ENTRY}
        left = [path for path in self._state.work.iterdir() if path.suffix in parts]
        left = [path for path in left if not self.is_pending(path.stem)]
        if not left:
            return
        before_s = self._state.disk_time_s() - _ABANDONED_S
        for path in left:
            if not self.is_pending(path.stem):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < before_s:
                        path.unlink()

    def path(self, batch_id: str, part: WorkPart) -> Path:
        """Path of a working file."""
        return self._state.work / f"{batch_id}{part}"
