"""Objects of clients in a folder that several gateways share.

An object has a kind, a tenant, an id and a content. It is one file, which is written as a temporary
file and then renamed: readers find the whole object or none, even if its writer was killed.

    state.json                   format of the folder
    new/                         temporary files
    responses/<tenant>/<id>      objects; the file's modification time is the expiry time
    work/                        files of unfinished work; the process that wrote a file removes it

There are no locks, so that any file system with an atomic rename is suitable. Each gateway counts
the stored objects of a tenant itself, at most once a second. Several gateways together may thus
exceed the limits within a second. All calls block; call in a thread.
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
    list_files,
    open_atomically,
    write_atomically,
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
from gateway.state.usage import StorageQuota

logger = logging.getLogger(__name__)

_ID = re.compile("[a-z]{1,16}_[0-9a-f]{32}")
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class ObjectKind:
    """A kind of objects, with its own folder."""

    name: str
    """Name of the folder."""
    prefix: str
    """Prefix of ids, such as ``resp`` in ``resp_0199...``."""
    drops_oldest: bool = False
    """Whether the tenant's oldest objects are dropped at a limit. If not, new ones are rejected."""


class StateStore:
    """Stores objects in the shared folder. Raises ``StorageError`` for file system errors.

    Args:
        folder: path of the state folder, which is created if it does not exist.
        max_objects: maximum number of objects per kind and tenant.
        max_bytes: maximum total size of their files.
        ttl_s: default lifetime of an object in seconds.
        clock: returns the Unix time in seconds.
        disk_clock: returns the file system's Unix time; None reads it from the file system.
        opens: whether to check the folder now; if False, before the first use.

    Raises:
        ConfigError: the folder has other contents, or cannot be written.
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
        self._usages = StorageQuota(max_objects, max_bytes, clock)
        self.max_bytes = max_bytes
        """Maximum total size of the objects of one kind and tenant."""
        self.ttl_s = ttl_s
        """Default lifetime of an object in seconds."""
        self.work = folder / WORK
        """Folder of unfinished work."""
        self._clock = clock
        self.disk_time_s = disk_clock or (lambda: disk_time_s(folder / NEW))
        """Returns the Unix time in seconds by the file system's clock. Raises ``OSError``."""
        self._expiry = Expiry(folder, ttl_s, clock, self.disk_time_s, self._usages.remove)
        self._opening = threading.Lock()
        self._is_open = False
        if opens:
            self.open()

    def require_open(self) -> None:
        """Raise ``StorageError`` unless the folder can be used."""
        with self._open_folder():
            pass

    def open(self) -> None:
        """Check or create the folder, unless this was done. Raises ``ConfigError``."""
        if self._is_open:
            return
        with self._opening:
            open_folder(self._folder)
            self._is_open = True

    def new_id(self, kind: ObjectKind) -> str:
        """Make an unguessable id. Ids of one kind sort by time, in milliseconds."""
        return f"{kind.prefix}_{int(self._clock() * 1000):012x}{secrets.token_hex(10)}"

    def put(
        self,
        kind: ObjectKind,
        tenant: str,
        object_id: str,
        content: bytes,
        ttl_s: float | None = None,
    ) -> None:
        """Store an object, and replace an object with the same id.

        Args:
            kind: kind of the object.
            tenant: owner of the object.
            object_id: id from ``new_id``.
            content: any bytes.
            ttl_s: lifetime in seconds; None selects the store's default.

        Raises:
            StorageFullError: the tenant's limit does not suffice, or the disk is full.
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
        """Like ``put`` for an object of ``size`` bytes in pieces, which are read only if the object
        fits. Errors of ``pieces`` are passed on.
        """
        place = self._object_path(kind, tenant, object_id)
        assert place is not None, "object_id is not from new_id"
        now_s = self._clock()
        expires_s = now_s + (self.ttl_s if ttl_s is None else ttl_s)
        head = encode_head(object_id, size, _NO_DIGEST, now_s, expires_s)
        digest, num_bytes = hashlib.sha256(), 0
        with self._open_folder():
            dropped = self._reserve_space(kind, place, len(head) + size)
            try:
                check_disk(self._folder, len(head) + size)
                with open_atomically(self._folder / NEW, place) as fd:
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
                self._usages.release(place)
                self._usages.forget(place.parent)
                raise
            self._usages.release(place)
        self._remove_replaced(dropped)

    def get(self, kind: ObjectKind, tenant: str, object_id: str) -> StoredObject | None:
        """Read an object; None if the tenant has no object with this id or it has expired.

        Raises ``StorageError`` if the object is damaged.
        """
        place = self._object_path(kind, tenant, object_id)
        if place is None:
            return None
        with self._open_folder():
            try:
                raw = place.read_bytes()
            except FileNotFoundError:
                return None
        found = decode(raw, object_id)
        return None if found.head.expires_s <= self._clock() else found

    def read_prefix(
        self, kind: ObjectKind, tenant: str, object_id: str, num_bytes: int
    ) -> bytes | None:
        """Return the first ``num_bytes`` bytes of a content, unchecked; None as for ``get``.

        Raises ``StorageError`` if the first line of the file is damaged.
        """
        place = self._object_path(kind, tenant, object_id)
        if place is None:
            return None
        with self._open_folder():
            try:
                with place.open("rb") as file:
                    line, content = file.readline(MAX_HEAD_BYTES), file.read(num_bytes)
            except FileNotFoundError:
                return None
        return None if decode_head(line).expires_s <= self._clock() else content

    def open_reader(self, kind: ObjectKind, tenant: str, object_id: str) -> StoredReader | None:
        """Open a reader of an object; None as for ``get``. Raises ``StorageError``."""
        place = self._object_path(kind, tenant, object_id)
        if place is None:
            return None
        with self._open_folder():
            try:
                reader = StoredReader(place, object_id)
            except FileNotFoundError:
                return None
        if reader.head.expires_s <= self._clock():
            reader.close()
            return None
        return reader

    def has_file(self, kind: ObjectKind, tenant: str, object_id: str) -> bool:
        """Whether the file of an object exists. The object may have expired."""
        place = self._object_path(kind, tenant, object_id)
        with self._open_folder():
            return place is not None and place.exists()

    def delete(self, kind: ObjectKind, tenant: str, object_id: str) -> bool:
        """Remove an object, which may be damaged; return whether it existed."""
        place = self._object_path(kind, tenant, object_id)
        with contextlib.suppress(StorageError):
            if self.get(kind, tenant, object_id) is None:
                return False
        assert place is not None, "an existing object has a path"
        with self._open_folder():
            return self._expiry.remove(place)

    def list_ids(self, kind: ObjectKind, tenant: str) -> list[str]:
        """Return the ids of a tenant's objects, oldest first. Objects may expire before a read."""
        now_s = self._clock()
        with self._open_folder():
            found = list_files(self._tenant_folder(kind, tenant))
            return sorted(entry.name for entry, stat in found if stat.st_mtime > now_s)

    def write_work(self, name: str, content: bytes) -> None:
        """Write a file in the folder ``work`` atomically."""
        with self._open_folder():
            write_atomically(self._folder / NEW, self.work / name, content)

    def sweep(self) -> int:
        """Remove expired objects and files of killed gateways; return the number of files."""
        with self._open_folder():
            return self._expiry.sweep()

    @contextlib.contextmanager
    def _open_folder(self) -> Iterator[None]:
        """Open the folder, and convert its errors to ``StorageError``."""
        with as_storage_error():
            try:
                self.open()
            except ConfigError as err:
                raise StorageError(f"the state folder {err.rule}") from err
            yield

    def _tenant_folder(self, kind: ObjectKind, tenant: str) -> Path:
        """Folder of a tenant. Its name is hashed, as it may contain any character."""
        return self._folder / kind.name / hashlib.sha256(tenant.encode()).hexdigest()[:32]

    def _object_path(self, kind: ObjectKind, tenant: str, object_id: str) -> Path | None:
        """Path of an object's file; None if the id is not valid for this kind."""
        is_id = _ID.fullmatch(object_id) is not None
        if not is_id or not object_id.startswith(f"{kind.prefix}_"):
            return None
        return self._tenant_folder(kind, tenant) / object_id

    def _reserve_space(self, kind: ObjectKind, place: Path, size: int) -> list[Path]:
        """Reserve space like ``StorageQuota.reserve``; at a limit, expired objects are removed."""
        try:
            return self._usages.reserve(place, size, kind.drops_oldest)
        except KeyFullError:
            if not self._expiry.sweep_folder(place.parent):  # nothing has expired
                raise
            return self._usages.reserve(place, size, kind.drops_oldest)

    def _remove_replaced(self, places: Iterable[Path]) -> None:
        """Remove the oldest objects, which a new object displaced. Errors are only logged."""
        for place in places:
            try:
                place.unlink(missing_ok=True)
            except OSError as err:
                logger.error("could not remove an old object from the state folder: %s", err)
                self._usages.forget(place.parent)


async def open_in_time(store: StateStore | None, threads: DiskThreads) -> None:
    """Open a store at the start of a gateway. Raises ``ConfigError``.

    If the disk does not respond, this function logs it and returns. Later calls open the store.
    """
    if store is None:
        return
    try:
        await threads.run(store.open)
    except StorageTimeoutError as err:
        logger.error("the gateway starts without its state folder: %s", err)


def open_store(section: GatewaySection, opens: bool = True) -> StateStore | None:
    """Make the store of a gateway; None without ``state_dir``. Raises ``ConfigError``."""
    if section.state_dir is None:
        return None
    return StateStore(
        Path(section.state_dir),
        max_objects=section.state_max_objects,
        max_bytes=section.state_max_bytes,
        ttl_s=section.state_ttl_s,
        opens=opens,
    )
