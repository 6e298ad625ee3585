"""Batches in the state folder, and the work on those that have not ended.

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
"""Age at which parts of a batch without an entry are of one that was never made, or has ended;
and an entry without a batch, too."""


class WorkPart(StrEnum):
    """Endings of the files of work; see the module."""

    ENTRY = ".json"
    REQUESTS = ".requests"
    ANSWERS = ".answers"
    FAILURES = ".failures"
    CANCEL = ".cancel"


class PendingBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that has not ended."""

    batch_id: str
    tenant: str


class BatchStore:
    """Batches of tenants; decides which have ended, and which work is left.

    Raises ``StorageError`` for whatever the file system refuses.

    Args:
        state: where objects are.
        clock: Unix time in seconds.
    """

    def __init__(self, state: StateStore, clock: Callable[[], float] = time.time) -> None:
        self._state = state
        self.files = FileStore(state, clock)
        """Files that batches are made of, and those of their answers."""
        self._clock = clock

    def new_id(self) -> str:
        """Id of a new batch."""
        return self._state.new_id(BATCHES)

    def make(self, tenant: str, batch: StoredBatch, requests: bytes) -> None:
        """Store a new batch, to be run. Raises ``StorageFullError``.

        Killed at any time, this leaves no batch that nobody runs.
        """
        self._check_room(tenant, len(requests))
        try:
            self._state.write_work(batch.id + WorkPart.REQUESTS, requests)
            entry = PendingBatch(batch_id=batch.id, tenant=tenant)
            self._state.write_work(batch.id + WorkPart.ENTRY, msgspec.json.encode(entry))
            self.save(tenant, batch)
        except StorageError:
            with contextlib.suppress(StorageError, OSError):
                self._state.delete(BATCHES, tenant, batch.id)  # it may be there, and not be synced
                self.end(batch.id)
            raise

    def _check_room(self, tenant: str, size: int) -> None:
        """Raise ``StorageFullError`` unless so much more may wait of this tenant."""
        max_bytes = self._state.max_bytes
        for work in self.waiting():
            if work.tenant == tenant:
                with contextlib.suppress(FileNotFoundError):
                    size += self.path(work.batch_id, WorkPart.REQUESTS).stat().st_size
        if size > max_bytes:
            raise KeyFullError(
                f"the requests of this key's batches that have not ended would have {size} bytes, "
                f"the limit is {max_bytes}: wait until some have ended, or cancel them"
            )

    def save(self, tenant: str, batch: StoredBatch) -> None:
        """Store how a batch is now: for whoever runs it. Raises ``StorageFullError``."""
        ttl_s = self._state.ttl_s + (0 if batch.status in ENDED else WINDOW_S)
        self._state.put(BATCHES, tenant, batch.id, msgspec.json.encode(batch), ttl_s)

    def get(self, tenant: str, batch_id: str) -> StoredBatch | None:
        """A batch; None where the tenant has no such one."""
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
        """Ids of a tenant's batches, the oldest first."""
        return self._state.list_ids(BATCHES, tenant)

    def cancel(self, batch_id: str) -> None:
        """Ask whoever runs a batch to end it."""
        if self.path(batch_id, WorkPart.ENTRY).exists():
            self._state.write_work(batch_id + WorkPart.CANCEL, b"")

    def is_cancelled(self, batch_id: str) -> bool:
        """Whether it shall end."""
        return self.path(batch_id, WorkPart.CANCEL).exists()

    def waiting(self) -> list[PendingBatch]:
        """Batches that have not ended, the oldest first; others may be running them."""
        found = []
        for path in sorted(self._state.work.glob(f"*{WorkPart.ENTRY}")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=PendingBatch))
            except FileNotFoundError:
                continue
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as err:
                logger.error("the batch of %s cannot be run: %s", path.name, err)
        return found

    def is_waiting(self, batch_id: str) -> bool:
        """Whether the batch has not ended."""
        return self.path(batch_id, WorkPart.ENTRY).exists()

    def take(self, work: PendingBatch) -> StoredBatch | None:
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

    def is_over(self, batch: StoredBatch) -> bool:
        """Whether a batch is to end though requests are left."""
        return self.is_cancelled(batch.id) or self.has_expired(batch)

    def has_expired(self, batch: StoredBatch) -> bool:
        """Whether the time of a batch is over, also by the clock of the file system."""
        window_s = batch.expires_at - batch.created_at
        return self._clock() >= batch.expires_at and self._age_s(batch.id) >= window_s

    def _age_s(self, batch_id: str) -> float:
        """Time since a batch was made, by the clock of the file system; 0.0 without an entry."""
        with contextlib.suppress(FileNotFoundError):
            made_s = self.path(batch_id, WorkPart.ENTRY).stat().st_mtime
            return self._state.disk_time_s() - made_s
        return 0.0

    def end(self, batch_id: str) -> None:
        """Remove the work on a batch, whose end is stored."""
        for part in WorkPart:
            self.path(batch_id, part).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove parts that have no entry: their makers were killed."""
        self._state.require_open()
        parts = set(WorkPart) - {WorkPart.ENTRY}
        left = [path for path in self._state.work.iterdir() if path.suffix in parts]
        left = [path for path in left if not self.is_waiting(path.stem)]
        if not left:
            return
        before_s = self._state.disk_time_s() - _ABANDONED_S
        for path in left:
            if not self.is_waiting(path.stem):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < before_s:
                        path.unlink()

    def path(self, batch_id: str, part: WorkPart) -> Path:
        """A part of the work on a batch that has not ended."""
        return self._state.work / f"{batch_id}{part}"
