"""The tier on local disk: files in a folder that one process has for itself (``folders``).

A file ``TENANT/NAME.kv`` is one KV block or state, a header and its bytes. TENANT is a digest of
the tenant's name, NAME the item's in hex. The header has the item's parent and a checksum of name,
parent and bytes, so that a torn, flipped or renamed file is detected: it counts as a miss, and is
deleted before the next one is written. A file appears under its name when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

import torch
from torch import Tensor

from workers.kv.tiers.folders import SUFFIX, UNFINISHED, ClaimedFolder, unusable
from workers.kv.tiers.order import TierTurn
from workers.kv.tiers.tier import Tier
from workers.kv.turns import KeepHints, TurnUse
from workers.requests.block_hash import HASH_BYTES, state_key
from workers.transport.peer_link import view_bytes

logger = logging.getLogger(__name__)

_MAGIC: Final = b"kv block 1\n"
_HEADER: Final = struct.Struct(f"!11sB{HASH_BYTES}sQ32s")
"""Magic, 1 with a parent, the parent, bytes of data, SHA-256."""
_WRONG_SIZE: Final = "its size is wrong"
_NO_PARENT: Final = bytes(HASH_BYTES)


@dataclass(frozen=True, slots=True)
class _Found:
    """A file of an earlier process."""

    name: bytes
    parent: bytes | None
    size: int
    tenant: str
    modified_s: float


class DiskTier(Tier):
    """Files in a folder; see the module. One thread puts items, any may read and forget them: that
    thread deletes their files, before it writes another one.
    """

    name: ClassVar[str] = "disk"

    def __init__(
        self,
        folder: ClaimedFolder,
        capacity_bytes: int,
        max_kept: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Goes on with what is in the folder, which belongs to this object from now on.

        Raises ``ConfigError`` where it cannot be used.
        """
        super().__init__(capacity_bytes, max_kept, clock)
        self._claimed = folder
        self._folder = folder.path
        self._tenants: dict[bytes, str] = {}
        self._unerased: deque[Path] = deque()
        self._num_written = 0
        self._is_failing = False
        try:
            self._take_over()
        except OSError as err:
            self.close()
            raise unusable(folder.path, err) from err

    def close(self) -> None:
        """Let another process have the folder; the files stay. The thread that puts has ended."""
        self.erase()
        self._claimed.release()

    @property
    def num_unerased(self) -> int:
        """Files of items that are gone."""
        return len(self._unerased)

    def erase(self) -> None:
        """Delete them; belongs to the thread that puts items."""
        while self._unerased:
            try:
                self._unerased.popleft().unlink(missing_ok=True)
            except OSError as err:
                self._note_failure(err)

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
        unfinished = self._folder / f"{self._num_written}{UNFINISHED}"
        view = view_bytes(data)
        try:
            path.parent.mkdir(exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(_header(name, parent, view))
                file.write(view)
            unfinished.rename(path)
        except OSError as err:
            self._note_failure(err)
            with contextlib.suppress(OSError):
                unfinished.unlink()
            return False
        self._is_failing = False
        self._tenants[name] = tenant
        return True

    def _read(self, name: bytes) -> Tensor | None:
        tenant = self._tenants.get(name)
        if tenant is None:
            return None
        try:
            return _content(self._path(tenant, name), name)
        except (OSError, ValueError) as err:
            if self.has(name):  # else it gave way while it was read
                self.num_broken += 1
                logger.warning("KV block %s on disk is broken: %s", name.hex(), err)
                self.forget((name,))
            return None

    def _erase(self, names: Sequence[bytes]) -> None:
        for name in names:
            if (tenant := self._tenants.pop(name, None)) is not None:
                self._unerased.append(self._path(tenant, name))

    def _path(self, tenant: str, name: bytes) -> Path:
        return self._folder / tenant / f"{name.hex()}{SUFFIX}"

    def _note_failure(self, err: OSError) -> None:
        if not self._is_failing:  # once, until a file is written again
            logger.warning("KV blocks are not kept on disk: %s", err)
        self._is_failing = True

    # Files of an earlier process

    def _take_over(self) -> None:
        """Go on with complete prefixes, as if the latest file had been used last."""
        found = {item.name: item for item in _files(self._folder)}
        lost: set[bytes] = set()
        for item in sorted(found.values(), key=lambda item: item.modified_s):
            self._enter_behind_parents(item, found, lost)
        for name, item in found.items():
            if not self.has(name):
                self._path(item.tenant, name).unlink(missing_ok=True)
        self._unerased.clear()  # some of them are here again
        if self._here:
            logger.info("%d KV blocks were found on disk", len(self._here))

    def _enter_behind_parents(
        self, item: _Found, found: dict[bytes, _Found], lost: set[bytes]
    ) -> None:
        """``lost``: items without a beginning, which are not followed twice."""
        chain = [item]
        while (parent := chain[-1].parent) is not None and not self.has(parent):
            if parent not in found or parent in lost or len(chain) > len(found):
                lost.update(each.name for each in chain)
                return
            chain.append(found[parent])
        for each in reversed(chain):
            self._enter_found(each)

    def _enter_found(self, item: _Found) -> None:
        """A file counts as a turn of its own, from which nothing is learned."""
        use = TurnUse(names=(), num_prompt=0, hints=KeepHints(tenant=item.tenant))
        turn = self._order.begin(use, self._clock())
        if self._order.add(turn, item.name, item.parent, item.size):
            self._tenants[item.name] = item.tenant
            if item.parent is not None and item.name == state_key(item.parent):
                self._states.add(item.name)
            self._show(item.name)
        self._erase(self._leave(self._order.take_gone()))
        self._order.end(turn)


def _digest(tenant: str) -> str:
    return hashlib.sha256(tenant.encode()).hexdigest()[:16]


def _header(name: bytes, parent: bytes | None, data: memoryview) -> bytes:
    checksum = hashlib.sha256(name)
    checksum.update(parent or b"")
    checksum.update(data)
    has_parent, parent = parent is not None, parent or _NO_PARENT
    return _HEADER.pack(_MAGIC, has_parent, parent, len(data), checksum.digest())


def _content(path: Path, name: bytes) -> Tensor:
    """The bytes of an item. Raises ``OSError``, and ``ValueError`` where they are others."""
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEADER.size)
        parent, size = _parsed(head)
        if os.fstat(file.fileno()).st_size != _HEADER.size + size:
            raise ValueError(_WRONG_SIZE)
        data = torch.empty(size, dtype=torch.uint8)
        view, done = view_bytes(data), 0
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise ValueError("it is cut off")
            done += count
    if _header(name, parent, view) != head:
        raise ValueError("its checksum differs")
    return data


def _parsed(head: bytes) -> tuple[bytes | None, int]:
    """Parent and bytes of data. Raises ``ValueError``."""
    if len(head) != _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError("it has no header")
    _, has_parent, parent, size, _ = _HEADER.unpack(head)
    return (parent if has_parent else None), size


def _files(folder: Path) -> Iterator[_Found]:
    """Files of items; broken ones are deleted, as far as a look at their beginnings shows."""
    for path in folder.glob(f"*/*{SUFFIX}"):
        try:
            name, facts = bytes.fromhex(path.stem), path.stat()
            with path.open("rb") as file:
                parent, size = _parsed(file.read(_HEADER.size))
            if facts.st_size != _HEADER.size + size:
                raise ValueError(_WRONG_SIZE)
        except ValueError as err:
            logger.warning("KV block %s on disk is broken: %s", path.stem, err)
            path.unlink()
            continue
        yield _Found(name, parent, size, path.parent.name, facts.st_mtime)
