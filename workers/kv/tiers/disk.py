"""Tier on local disk: files in a folder that one process has locked (``folders``).

A file ``TENANT/NAME.kv`` contains one KV block or state: a header and the data. TENANT is a digest
of the tenant's name, NAME the item's name in hex. The header has a digest of the identity
(everything besides the tokens that determines the data), the item's parent and a checksum of name,
identity, parent and data. So a truncated, corrupt, renamed or differently computed file is
detected: it counts as a miss and is deleted before the next write. Files are renamed to their
names when they are complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import ClassVar, Final

import torch
from torch import Tensor

from workers.kv.tiers.folders import SUFFIX, UNFINISHED, ClaimedFolder, item_entries
from workers.kv.tiers.index import TierTurn
from workers.kv.tiers.tier import Tier
from workers.kv.turns import KeepHints, TurnUse
from workers.requests.block_hash import HASH_BYTES, state_key
from workers.transport.peer_link import view_bytes

logger = logging.getLogger(__name__)

_MAGIC: Final = b"kv block 2\n"
_IDENTITY_BYTES: Final = 16
_HEADER: Final = struct.Struct(f"!11s{_IDENTITY_BYTES}sB{HASH_BYTES}sQ32s")
"""Magic, digest of the identity, 1 if the item has a parent, parent, size of data, SHA-256."""
_WRONG_SIZE: Final = "its size is wrong"
_NO_PARENT: Final = bytes(HASH_BYTES)


@dataclass(frozen=True, slots=True)
class _StoredItem:
    """Header fields of a file that an earlier process wrote."""

    name: bytes
    identity: bytes
    parent: bytes | None
    size: int
    tenant: str
    modified_s: float


class DiskTier(Tier):
    """Tier of files in a folder. It has no items until ``use`` sets their identity.

    One thread calls ``use``, puts items and erases files. Any thread may read and forget items.
    """

    name: ClassVar[str] = "disk"

    def __init__(
        self,
        folder: ClaimedFolder,
        capacity_bytes: int,
        max_kept: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Scan the folder, which this object then owns.

        Unreadable entries are skipped. Raises ``OSError`` if the folder cannot be read.
        """
        super().__init__(capacity_bytes, max_kept, clock)
        self.folder = folder
        self.failure = ""
        """Error of the last write; empty if it succeeded."""
        self._identity = b""
        self._tenants: dict[bytes, str] = {}
        self._unerased: deque[Path] = deque()
        self._num_written = 0
        try:
            self._stored = self._scan()
        except OSError:
            folder.release()
            raise

    def use(self, identity: str) -> None:
        """Use the stored items of this identity and delete all others."""
        digest = hashlib.sha256(identity.encode()).digest()[:_IDENTITY_BYTES]
        if digest == self._identity:
            return
        with self._lock:
            others = self._order.names
        self.forget(others)
        self._identity = digest
        stored, self._stored = self._stored, {}
        self._take_over(stored)
        try:
            self.folder.describe(identity)
        except OSError as err:  # it is in every header, too
            self._note_failure(err)

    def close(self) -> None:
        """Unlock the folder and keep the files. The thread that puts items must have ended."""
        self.erase()
        self.folder.release()

    @property
    def num_unerased(self) -> int:
        """Number of files of evicted or forgotten items."""
        return len(self._unerased)

    def erase(self) -> None:
        """Delete files of evicted and forgotten items. Call it on the thread that puts items."""
        while self._unerased:
            path = self._unerased.popleft()
            if self._is_item(path):
                continue
            try:
                path.unlink(missing_ok=True)
            except OSError as err:
                logger.warning("could not delete a KV block on disk: %s", err)

    def begin(self, use: TurnUse) -> TierTurn:
        return super().begin(
            replace(use, hints=replace(use.hints, tenant=_digest(use.hints.tenant)))
        )

    def bytes_of(self, tenant: str) -> int:
        return super().bytes_of(_digest(tenant))

    def _write(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        tenant = turn.use.hints.tenant
        path = self._path(tenant, name)
        self.erase()
        self._num_written += 1
        unfinished = self.folder.path / f"{self._num_written}{UNFINISHED}"
        view = view_bytes(data)
        try:
            path.parent.mkdir(exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(_header(name, self._identity, parent, view))
                file.write(view)
            unfinished.rename(path)
        except OSError as err:
            self._note_failure(err)
            with contextlib.suppress(OSError):
                unfinished.unlink()
            return False
        self.failure = ""
        self._tenants[name] = tenant
        return True

    def _read(self, name: bytes) -> Tensor | None:
        tenant = self._tenants.get(name)
        if tenant is None:
            return None
        try:
            return _content(self._path(tenant, name), name, self._identity)
        except (OSError, ValueError) as err:
            if self.has(name):  # else it was evicted during the read
                self.num_broken += 1
                logger.warning("KV block %s on disk is broken: %s", name.hex(), err)
                self.forget((name,))
            return None

    def _erase(self, names: Sequence[bytes]) -> None:
        for name in names:
            if (tenant := self._tenants.pop(name, None)) is not None:
                self._unerased.append(self._path(tenant, name))

    def _path(self, tenant: str, name: bytes) -> Path:
        return self.folder.path / tenant / f"{name.hex()}{SUFFIX}"

    def _is_item(self, path: Path) -> bool:
        """Whether ``path`` is the file of an item in this tier."""
        try:
            name = bytes.fromhex(path.stem)
        except ValueError:
            return False
        return self.has(name) and path.parent.name == self._tenants.get(name)

    def _note_failure(self, err: OSError) -> None:
        if not self.failure:  # once, until a file is written again
            logger.warning("KV blocks are not kept on disk: %s", err)
        self.failure = str(err)

    # Files of an earlier process

    def _scan(self) -> dict[bytes, _StoredItem]:
        """Return items by name. Files without a valid header are marked for deletion.

        Raises ``OSError`` if the folder cannot be read.
        """
        self._unerased.extend(self.folder.path.glob(f"*{UNFINISHED}"))
        stored: dict[bytes, _StoredItem] = {}
        first: tuple[str, Exception] | None = None
        for entry in item_entries(self.folder.path):
            try:
                item = _stored_item(entry)
            except (OSError, ValueError) as err:
                self.num_broken += 1
                first = first or (entry.name, err)
                if isinstance(err, ValueError):  # else it may be readable at another time
                    self._unerased.append(Path(entry.path))
            else:
                stored[item.name] = item
        if first is not None:
            what = "KV blocks on disk are broken: %d; the first is %r (%s)"
            logger.warning(what, self.num_broken, *first)
        return stored

    def _take_over(self, stored: dict[bytes, _StoredItem]) -> None:
        """Add the items whose prefixes are complete. The latest file is the most recently used."""
        own = {n: item for n, item in stored.items() if item.identity == self._identity}
        found = _latest(own, self.capacity_bytes)  # an eviction could remove a parent
        for item in sorted(found.values(), key=lambda item: item.modified_s):
            self._enter_behind_parents(item, found)
        others = [self._path(item.tenant, n) for n, item in stored.items() if not self.has(n)]
        self._unerased.extend(others)
        if stored:
            num = len(self._here)
            logger.info("found %d usable KV blocks on disk, and %d others", num, len(others))

    def _enter_behind_parents(self, item: _StoredItem, found: dict[bytes, _StoredItem]) -> None:
        """Add an item, but first its parents, which are in ``found`` or here."""
        chain = [item]
        while (parent := chain[-1].parent) is not None and not self.has(parent):
            chain.append(found[parent])
        for each in reversed(chain):
            self._enter_found(each)

    def _enter_found(self, item: _StoredItem) -> None:
        """Add the item of a file that was found when the folder was opened. The item gets a turn of
        its own in the eviction order; reads of this turn do not count as reuse."""
        use = TurnUse(names=(), num_prompt=0, hints=KeepHints(tenant=item.tenant))
        with self._lock:
            turn = self._order.begin(use, self._clock())
            if self._order.add(turn, item.name, item.parent, item.size):
                self._tenants[item.name] = item.tenant
                if item.parent is not None and item.name == state_key(item.parent):
                    self._states.add(item.name)
                self._show(item.name)
            self._order.end(turn)


def _latest(found: dict[bytes, _StoredItem], capacity_bytes: int) -> dict[bytes, _StoredItem]:
    """Return the latest items that fit into ``capacity_bytes``, by name, with all their parents.

    Of the last prefix, only the beginning may fit. Items that lack a parent are left out.
    """
    latest: dict[bytes, _StoredItem] = {}
    lost: set[bytes] = set()
    for item in sorted(found.values(), key=lambda item: item.modified_s, reverse=True):
        chain = list[_StoredItem]()
        name: bytes | None = item.name
        while name is not None and name not in latest:
            if name not in found or name in lost or len(chain) == len(found):
                lost.update(each.name for each in chain)
                chain.clear()
                break
            chain.append(found[name])
            name = found[name].parent
        for each in reversed(chain):
            capacity_bytes -= each.size
            if capacity_bytes < 0:
                return latest
            latest[each.name] = each
    return latest


def _digest(tenant: str) -> str:
    return hashlib.sha256(tenant.encode()).hexdigest()[:16]


def _header(name: bytes, identity: bytes, parent: bytes | None, data: memoryview) -> bytes:
    checksum = hashlib.sha256(name)
    checksum.update(identity)
    checksum.update(parent or b"")
    checksum.update(data)
    has_parent, parent = parent is not None, parent or _NO_PARENT
    return _HEADER.pack(_MAGIC, identity, has_parent, parent, len(data), checksum.digest())


def _content(path: Path, name: bytes, identity: bytes) -> Tensor:
    """Read the data of an item. Raises ``OSError``, and ``ValueError`` if it is corrupt."""
    with FileIO(path, opener=_open_file) as file:
        head = file.read(_HEADER.size)
        _, parent, size = _parsed(head)
        if os.fstat(file.fileno()).st_size != _HEADER.size + size:
            raise ValueError(_WRONG_SIZE)
        data = torch.empty(size, dtype=torch.uint8)
        view, done = view_bytes(data), 0
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise ValueError("it is truncated")
            done += count
    if _header(name, identity, parent, view) != head:
        raise ValueError("its checksum differs")
    return data


def _parsed(head: bytes) -> tuple[bytes, bytes | None, int]:
    """Return identity digest, parent and data size of a header. Raises ``ValueError``."""
    if len(head) != _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError("it has no header")
    _, identity, has_parent, parent, size, _ = _HEADER.unpack(head)
    return identity, (parent if has_parent else None), size


def _stored_item(entry: os.DirEntry[str]) -> _StoredItem:
    """Read the header of a file that an earlier process wrote.

    Raises ``OSError`` if it cannot be read, and ``ValueError`` if it is not an item.
    """
    path = Path(entry.path)
    with FileIO(path, opener=_open_file) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", entry.path)
        identity, parent, size = _parsed(file.read(_HEADER.size))
    if facts.st_size != _HEADER.size + size:
        raise ValueError(_WRONG_SIZE)
    name = bytes.fromhex(path.stem)
    if name.hex() != path.stem:  # spaces or capitals, which fromhex accepts
        raise ValueError("its name is not the name of an item")
    return _StoredItem(name, identity, parent, size, path.parent.name, facts.st_mtime)


def _open_file(path: str, flags: int) -> int:
    """Open a file without following links, and without blocking if it is a pipe."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
