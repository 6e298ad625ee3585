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
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from errno import EIO
from pathlib import Path

from cluster.config.gateway import GatewaySection
from cluster.core.errors import ConfigError
from cluster.disk.files import write_all
from cluster.disk.threads import DiskThreads
from gateway.core.errors import KeyFullError, StorageError, StorageTimeoutError
from gateway.state.expiry import Expiry
from gateway.state.files import (
    as_storage_error,
    check_disk,
    disk_time_s,
    entries,
    write_aside,
    written_aside,
)
from gateway.state.folder import NEW, WORK, open_folder
from gateway.state.reader import StoredReader
from gateway.state.record import (
    MAX_HEAD_BYTES,
    StoredObject,
    decode,
    decode_head,
    encode_head,
)
from gateway.state.usage import Usages

logger = logging.getLogger(__name__)

_ID = re.compile("[a-z]{1,16}_[0-9a-f]{32}")
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class ObjectKind:
    """Objects of one sort, in a folder of their own."""

    name: str
    """The folder's."""
    prefix: str
    """Of ids: ``resp`` of ``resp_0199...``."""
    drops_oldest: bool = False
    """At a bound the tenant's oldest objects make room; else new ones are refused."""


class StateStore:
    """See the module. Raises ``StorageError`` for whatever the file system refuses.

    Args:
        folder: created if it is missing.
        max_objects: of one kind and tenant.
        max_bytes: of these objects' files together.
        ttl_s: life of an object that says nothing else.
        clock: Unix time in seconds.
        disk_clock: the same by the file system; None asks it.
        opens: look at the folder now; otherwise before it is used.

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
        disk_clock: Callable[[], float] | None = None,
        opens: bool = True,
    ) -> None:
        self._folder = folder
        self._usages = Usages(max_objects, max_bytes, clock)
        self.max_bytes = max_bytes
        """Of the objects of one kind and tenant."""
        self.ttl_s = ttl_s
        """Life of an object that says nothing else."""
        self.work = folder / WORK
        """Files of work that has not ended."""
        self._clock = clock
        self.disk_time_s = disk_clock or (lambda: disk_time_s(folder / NEW))
        """Unix time by the clock of the file system. Raises ``OSError``."""
        self._expiry = Expiry(folder, ttl_s, clock, self.disk_time_s, self._usages.remove)
        self._opening = threading.Lock()
        self._is_open = False
        if opens:
            self.open()

    def require_open(self) -> None:
        """Raise ``StorageError`` unless the folder can be used."""
        with self._used():
            pass

    def open(self) -> None:
        """Check and complete the folder, once. Raises ``ConfigError``."""
        if self._is_open:
            return
        with self._opening:
            open_folder(self._folder)
            self._is_open = True

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
        self.put_pieces(kind, tenant, object_id, len(content), [content], ttl_s)

    def put_pieces(
        self,
        kind: ObjectKind,
        tenant: str,
        object_id: str,
        size: int,
        pieces: Iterable[bytes],
        ttl_s: float | None = None,
    ) -> None:
        """Store an object of ``size`` bytes that comes in pieces, which are asked for only when
        there is room for all of them. Otherwise as ``put``; an error of ``pieces`` is passed on.
        """
        place = self._place(kind, tenant, object_id)
        assert place is not None, "ids are made here"
        now_s = self._clock()
        expires_s = now_s + (self.ttl_s if ttl_s is None else ttl_s)
        head = encode_head(object_id, size, _NO_DIGEST, now_s, expires_s)
        digest, num_bytes = hashlib.sha256(), 0
        with self._used():
            dropped = self._make_room(kind, place, len(head) + size)
            try:
                check_disk(self._folder, len(head) + size)
                with written_aside(self._folder / NEW, place) as fd:
                    write_all(fd, head)
                    for piece in pieces:
                        digest.update(piece)
                        num_bytes += len(piece)
                        write_all(fd, piece)
                    if num_bytes != size:
                        raise StorageError(f"{object_id} has {num_bytes} bytes, not {size}")
                    head = encode_head(object_id, size, digest.hexdigest(), now_s, expires_s)
                    if os.pwrite(fd, head, 0) != len(head):
                        raise OSError(EIO, os.strerror(EIO))
                    os.utime(fd, (expires_s, expires_s))
            except BaseException:
                self._usages.forget(place.parent)
                raise
        self._drop(dropped)

    def get(self, kind: ObjectKind, tenant: str, object_id: str) -> StoredObject | None:
        """An object; None where the tenant has none of this id, or it has expired.

        Raises ``StorageError`` if it is damaged.
        """
        place = self._place(kind, tenant, object_id)
        if place is None:
            return None
        with self._used():
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
        with self._used():
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
        with self._used():
            try:
                reader = StoredReader(place, object_id)
            except FileNotFoundError:
                return None
        if reader.head.expires_s <= self._clock():
            reader.close()
            return None
        return reader

    def has_file(self, kind: ObjectKind, tenant: str, object_id: str) -> bool:
        """Whether the file of an object is there, also of one that has expired."""
        place = self._place(kind, tenant, object_id)
        with self._used():
            return place is not None and place.exists()

    def delete(self, kind: ObjectKind, tenant: str, object_id: str) -> bool:
        """Remove an object, also a damaged one; whether there was one."""
        place = self._place(kind, tenant, object_id)
        with contextlib.suppress(StorageError):
            if self.get(kind, tenant, object_id) is None:
                return False
        assert place is not None, "it was there"
        with self._used():
            return self._expiry.remove(place)

    def list_ids(self, kind: ObjectKind, tenant: str) -> list[str]:
        """Ids of a tenant's objects, the oldest first. Some may expire before they are read."""
        now_s = self._clock()
        with self._used():
            found = entries(self._tenant_folder(kind, tenant))
            return sorted(entry.name for entry, stat in found if stat.st_mtime > now_s)

    def write_work(self, name: str, content: bytes) -> None:
        """Write a file of ``work``, whole or not at all."""
        with self._used():
            write_aside(self._folder / NEW, self.work / name, content)

    def sweep(self) -> int:
        """Remove what has expired, and what killed gateways left; the number of removed files."""
        with self._used():
            return self._expiry.sweep()

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        """The folder is open; its errors become ``StorageError``."""
        with as_storage_error():
            try:
                self.open()
            except ConfigError as err:
                raise StorageError(f"the state folder {err.rule}") from err
            yield

    def _tenant_folder(self, kind: ObjectKind, tenant: str) -> Path:
        """Names of tenants are hashed: they may hold any characters."""
        return self._folder / kind.name / hashlib.sha256(tenant.encode()).hexdigest()[:32]

    def _place(self, kind: ObjectKind, tenant: str, object_id: str) -> Path | None:
        """The file of an object; None for what can be no id of this kind."""
        is_id = _ID.fullmatch(object_id) is not None
        if not is_id or not object_id.startswith(f"{kind.prefix}_"):
            return None
        return self._tenant_folder(kind, tenant) / object_id

    def _make_room(self, kind: ObjectKind, place: Path, size: int) -> list[Path]:
        """See ``Usages.reserve``."""
        try:
            return self._usages.reserve(place, size, kind.drops_oldest)
        except KeyFullError:
            if not self._expiry.sweep_folder(place.parent):  # nothing has expired
                raise
            return self._usages.reserve(place, size, kind.drops_oldest)

    def _drop(self, places: Iterable[Path]) -> None:
        """Remove objects that another one has replaced. It is stored: errors are logged alone."""
        for place in places:
            try:
                place.unlink(missing_ok=True)
            except OSError as err:
                logger.error("an old object stays in the state folder: %s", err)
                self._usages.forget(place.parent)


async def open_in_time(store: StateStore | None, threads: DiskThreads) -> None:
    """Open a store at the start of its gateway. Raises ``ConfigError``.

    A disk that does not answer is logged: calls that need the store open it later, or fail.
    """
    if store is None:
        return
    try:
        await threads.run(store.open)
    except StorageTimeoutError as err:
        logger.error("the gateway starts without its state folder: %s", err)


def open_store(section: GatewaySection, opens: bool = True) -> StateStore | None:
    """The store of a gateway; None without ``state_dir``. Raises ``ConfigError``."""
    if section.state_dir is None:
        return None
    return StateStore(
        Path(section.state_dir),
        max_objects=section.state_max_objects,
        max_bytes=section.state_max_bytes,
        ttl_s=section.state_ttl_s,
        opens=opens,
    )
