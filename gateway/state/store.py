"""Objects of clients in a folder that several gateways share.

An object has a kind, a tenant, an id and a content. It is one file, which is written beside its
place and then renamed into it: readers see all of it or nothing, whenever a writer is killed.

    state.json                   says what the folder is
    new/                         files that are being written
    responses/<tenant>/<id>      objects; the file's modification time is when it expires
    work/                        files of work that has not ended; whoever wrote them removes them

There are no locks, so that any file system will do on which a rename is atomic. Each gateway counts
what a tenant has stored itself, at most a second ago: what others store within it comes on top of
the bounds. All calls block, and are for threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cluster.config.gateway import GatewaySection
from cluster.core.checks import check
from cluster.core.errors import ConfigError
from gateway.core.errors import StorageError, StorageFullError
from gateway.state.files import as_storage_error, entries, has_expired, move, write_aside
from gateway.state.reader import StoredReader
from gateway.state.record import (
    FORMAT,
    MAX_HEAD_BYTES,
    StoredObject,
    decode,
    decode_head,
    encode,
)

_ID = re.compile("[a-z]{1,16}_[0-9a-f]{32}")
_MARK = "state.json"
_NEW, _WORK = "new", "work"
_FRESH_S = 1.0
_ABANDONED_S = 3600.0
"""Age at which a file that is being written has no writer any more."""


@dataclass(frozen=True, slots=True)
class ObjectKind:
    """Objects of one sort, in a folder of their own."""

    name: str
    """The folder's."""
    prefix: str
    """Of ids: ``resp`` of ``resp_0199...``."""
    drops_oldest: bool = False
    """At a bound the tenant's oldest objects make room; else new ones are refused."""


class _Mark(msgspec.Struct, frozen=True, kw_only=True):
    """What ``state.json`` says."""

    state_format: int


@dataclass(slots=True)
class _Usage:
    """What a tenant has stored of one kind."""

    counted_s: float
    """Unix time."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file by id, the oldest first."""

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())


class StateStore:
    """See the module. Raises ``StorageError`` for whatever the file system refuses.

    Args:
        folder: created if it is missing.
        max_objects: of one kind and tenant.
        max_bytes: of these objects' files together.
        ttl_s: life of an object that says nothing else.
        clock: Unix time in seconds.

    Raises:
        ConfigError: the folder is another one's, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_objects: int,
        max_bytes: int,
        ttl_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._max_objects = max_objects
        self.max_bytes = max_bytes
        """Of the objects of one kind and tenant."""
        self.ttl_s = ttl_s
        """Life of an object that says nothing else."""
        self.work = folder / _WORK
        """Files of work that has not ended."""
        self._clock = clock
        self._lock = threading.Lock()
        self._usages: dict[Path, _Usage] = {}
        try:
            self._open()
        except (OSError, msgspec.MsgspecError) as err:
            reason = getattr(err, "strerror", None) or "state.json is damaged"
            raise ConfigError("state_dir", str(folder), f"cannot be used: {reason}") from err

    def new_id(self, kind: ObjectKind) -> str:
        """An id that nobody guesses; ids of one kind sort by time, in milliseconds."""
        return f"{kind.prefix}_{int(self._clock() * 1000):012x}{secrets.token_hex(10)}"

    def put(
        self,
        kind: ObjectKind,
        tenant: str,
        object_id: str,
        content: bytes,
        ttl_s: float | None = None,
    ) -> None:
        """Store an object, in place of one with the same id.

        Args:
            kind: its sort.
            tenant: whose it is.
            object_id: of ``new_id``.
            content: any bytes.
            ttl_s: its life; None is the store's.

        Raises:
            StorageFullError: it is larger than all that the tenant may store, or there is no room.
        """
        place = self._place(kind, tenant, object_id)
        assert place is not None, "ids are made here"
        now_s = self._clock()
        expires_s = now_s + (self.ttl_s if ttl_s is None else ttl_s)
        raw = encode(object_id, content, now_s, expires_s)
        with as_storage_error():
            self._make_room(kind, place, len(raw))
            self._write(place, raw, expires_s)

    def get(self, kind: ObjectKind, tenant: str, object_id: str) -> StoredObject | None:
        """An object; None where the tenant has none of this id, or it has expired.

        Raises ``StorageError`` if it is damaged.
        """
        place = self._place(kind, tenant, object_id)
        if place is None:
            return None
        with as_storage_error():
            try:
                raw = place.read_bytes()
            except FileNotFoundError:
                return None
        found = decode(raw, object_id)
        return None if found.head.expires_s <= self._clock() else found

    def begin_of(
        self, kind: ObjectKind, tenant: str, object_id: str, num_bytes: int
    ) -> bytes | None:
        """At most so much of an object's content, which is not checked; None as of ``get``.

        Raises ``StorageError`` if its first line is damaged.
        """
        place = self._place(kind, tenant, object_id)
        if place is None:
            return None
        with as_storage_error():
            try:
                with place.open("rb") as file:
                    line, content = file.readline(MAX_HEAD_BYTES), file.read(num_bytes)
            except FileNotFoundError:
                return None
        return None if decode_head(line).expires_s <= self._clock() else content

    def open_reader(self, kind: ObjectKind, tenant: str, object_id: str) -> StoredReader | None:
        """Reads an object in pieces; None as of ``get``. Raises ``StorageError``."""
        place = self._place(kind, tenant, object_id)
        if place is None:
            return None
        with as_storage_error():
            try:
                reader = StoredReader(place, object_id)
            except FileNotFoundError:
                return None
        if reader.head.expires_s <= self._clock():
            reader.close()
            return None
        return reader

    def delete(self, kind: ObjectKind, tenant: str, object_id: str) -> bool:
        """Remove an object, also a damaged one; whether there was one."""
        place = self._place(kind, tenant, object_id)
        with contextlib.suppress(StorageError):
            if self.get(kind, tenant, object_id) is None:
                return False
        assert place is not None, "it was there"
        with as_storage_error():
            return self._remove(place)

    def list_ids(self, kind: ObjectKind, tenant: str) -> list[str]:
        """Ids of a tenant's objects, the oldest first. Some may expire before they are read."""
        now_s = self._clock()
        with as_storage_error():
            found = entries(self._tenant_folder(kind, tenant))
            return sorted(entry.name for entry, stat in found if stat.st_mtime > now_s)

    def write_work(self, name: str, content: bytes) -> None:
        """Write a file of ``work``, whole or not at all."""
        with as_storage_error():
            move(write_aside(self._folder / _NEW, content), self.work / name)

    def sweep(self) -> int:
        """Remove what has expired, and what killed gateways left; the number of removed files."""
        with as_storage_error():
            return sum(map(self._sweep, self._tenant_folders())) + self._sweep_new()

    def _open(self) -> None:
        is_new = not self._folder.exists()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark = self._folder / _MARK
        if not mark.exists():
            others = [] if is_new else sorted({*os.listdir(self._folder)} - {_NEW, _WORK})
            # others may be starting on the same folder: then their mark is there by now
            rule = "holds other files: give an empty folder, or a new one"
            check(not others or mark.exists(), "state_dir", str(self._folder), rule)
        (self._folder / _NEW).mkdir(mode=0o700, exist_ok=True)
        self.work.mkdir(mode=0o700, exist_ok=True)
        if not mark.exists():
            raw = msgspec.json.encode(_Mark(state_format=FORMAT))
            move(write_aside(self._folder / _NEW, raw), mark)
        found = msgspec.json.decode(mark.read_bytes(), type=_Mark).state_format
        rule = f"holds objects of the format {found}, this release has {FORMAT}"
        check(found == FORMAT, "state_dir", str(self._folder), rule)
        write_aside(self._folder / _NEW, b"").unlink()  # it can be written

    def _tenant_folder(self, kind: ObjectKind, tenant: str) -> Path:
        """Names of tenants are hashed: they may hold any characters."""
        return self._folder / kind.name / hashlib.sha256(tenant.encode()).hexdigest()[:32]

    def _place(self, kind: ObjectKind, tenant: str, object_id: str) -> Path | None:
        """The file of an object; None for what can be no id of this kind."""
        is_id = _ID.fullmatch(object_id) is not None
        if not is_id or not object_id.startswith(f"{kind.prefix}_"):
            return None
        return self._tenant_folder(kind, tenant) / object_id

    def _make_room(self, kind: ObjectKind, place: Path, size: int) -> None:
        """Raise ``StorageFullError`` unless a file of ``size`` bytes fits within the bounds."""
        try:
            self._take_room(kind, place, size)
        except StorageFullError:
            if not self._sweep(place.parent):  # nothing has expired
                raise
            self._take_room(kind, place, size)

    def _take_room(self, kind: ObjectKind, place: Path, size: int) -> None:
        if size > self.max_bytes:
            raise StorageFullError(
                f"an object of {size} bytes is above the limit of {self.max_bytes} for a key"
            )
        with self._lock:
            usage = self._usage(place.parent)
            sizes = usage.sizes
            sizes.pop(place.name, None)
            num_bytes = usage.num_bytes
            for oldest in list(sizes) if kind.drops_oldest else ():
                if len(sizes) < self._max_objects and num_bytes + size <= self.max_bytes:
                    break
                (place.parent / oldest).unlink(missing_ok=True)
                num_bytes -= sizes.pop(oldest)
            if len(sizes) >= self._max_objects:
                raise StorageFullError(
                    f"this key has stored {len(sizes)} {kind.name}, the limit is "
                    f"{self._max_objects}: delete some, or wait until they expire"
                )
            if num_bytes + size > self.max_bytes:
                raise StorageFullError(
                    f"this key has stored {num_bytes} bytes of {kind.name}, {size} more are above "
                    f"the limit of {self.max_bytes}: delete some, or wait until they expire"
                )
            sizes[place.name] = size

    def _usage(self, folder: Path) -> _Usage:
        """What is in a tenant's folder, counted at most ``_FRESH_S`` ago."""
        now_s = self._clock()
        fresh = {f: u for f, u in self._usages.items() if 0 <= now_s - u.counted_s < _FRESH_S}
        self._usages = fresh
        if folder in fresh:
            return fresh[folder]
        sizes = {entry.name: stat.st_size for entry, stat in entries(folder)}
        self._usages[folder] = _Usage(now_s, dict(sorted(sizes.items())))
        return self._usages[folder]

    def _write(self, place: Path, raw: bytes, expires_s: float) -> None:
        made = write_aside(self._folder / _NEW, raw)
        os.utime(made, (expires_s, expires_s))
        move(made, place)

    def _remove(self, place: Path) -> bool:
        with self._lock:
            if (usage := self._usages.get(place.parent)) is not None:
                usage.sizes.pop(place.name, None)
        try:
            place.unlink()
        except FileNotFoundError:
            return False
        return True

    def _tenant_folders(self) -> Iterator[Path]:
        for kind in self._folder.iterdir():
            if kind.is_dir() and kind.name not in (_NEW, _WORK):
                yield from (folder for folder in kind.iterdir() if folder.is_dir())

    def _sweep(self, folder: Path) -> int:
        now_s, num_removed = self._clock(), 0
        found = entries(folder)
        for entry, stat in found:
            place = folder / entry.name
            if stat.st_mtime <= now_s and has_expired(place, now_s):
                num_removed += self._remove(place)
        if num_removed == len(found):
            with contextlib.suppress(OSError):
                folder.rmdir()  # unless a new object has come
        return num_removed

    def _sweep_new(self) -> int:
        """Files of writers that were killed; their modification time may be that of an expiry."""
        before_s, num_removed = self._clock() - _ABANDONED_S, 0
        for entry, stat in entries(self._folder / _NEW):
            if stat.st_ctime < before_s:
                (self._folder / _NEW / entry.name).unlink(missing_ok=True)
                num_removed += 1
        return num_removed


def open_store(section: GatewaySection) -> StateStore | None:
    """The store of a gateway; None without ``state_dir``. Raises ``ConfigError``."""
    if section.state_dir is None:
        return None
    return StateStore(
        Path(section.state_dir),
        max_objects=section.state_max_objects,
        max_bytes=section.state_max_bytes,
        ttl_s=section.state_ttl_s,
    )
