"""A worker's lower tiers (host memory, disk), the copies into them and the restores."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from cluster.config.kv_tiers import KvTiersSection
from cluster.core.checks import check
from cluster.core.errors import ConfigError
from workers.engine.engine import Engine
from workers.kv.block_pool import HashChanges
from workers.kv.cache import KVCache
from workers.kv.tiers.changes import held_changes
from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.disk_writer import DiskWriter
from workers.kv.tiers.folders import ClaimedFolder, claim_folder, delete_abandoned
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.fetch_cost import FetchCost
from workers.kv.transfer.turn_copier import TurnCopier
from workers.process.intake.kv_restores import KvRestores

logger = logging.getLogger(__name__)

OPEN_LIMIT_S = 5.0
"""Longest wait for the disk at the start of a worker."""


@dataclass(frozen=True, slots=True)
class LowerTiers:
    """The lower tiers of a worker. Engine's thread only, except ``stats`` and ``problems``."""

    tiers: KvTiers
    copies: TurnCopier
    """Copies the blocks of ended turns into the tiers."""
    restores: KvRestores
    """Requests that wait for restored blocks."""

    @classmethod
    def of(
        cls, tiers: KvTiers, engine: Engine, computing: FetchCost, wake: Callable[[], None]
    ) -> LowerTiers:
        """Start copies and restores. ``wake`` is called, on any thread, when there is work."""
        copies = engine.start_tier_copies(tiers, wake)
        return cls(tiers, copies, KvRestores(engine, tiers, computing, wake))

    def changes(self, changes: HashChanges, engine: Engine) -> HashChanges:
        """Merge ``changes`` of the pool with those of the tiers; a block in either stays known."""
        return held_changes(changes, engine.pool, self.tiers)

    def stats(self) -> dict[str, float]:
        """Metrics by name without prefix. Any thread may call it."""
        return {**self.tiers.stats(), **self.restores.stats()}

    def problems(self, worker: str) -> tuple[str, ...]:
        """Texts about failures of the tiers, for status output. Any thread may call it."""
        problem = self.tiers.problem
        return (f"{worker} keeps no KV blocks on disk: {problem}",) if problem else ()

    def close(self) -> None:
        """Stop copies and restores. The blocks on disk stay for the next process."""
        self.restores.close()
        self.copies.close()
        self.tiers.close()


def open_tiers(
    section: KvTiersSection,
    cache: KVCache,
    kept_share: float,
    rank: int,
    model: str = "",
    needed: Callable[[], Collection[int] | None] = lambda: None,
) -> KvTiers | None:
    """Open the lower tiers of one attention worker; None if there are none.

    The disk tier is used once ``KvTiers.use`` has set the identity of blocks. If the disk fails or
    does not respond within ``OPEN_LIMIT_S``, the worker serves without it. ``kept_share``: fraction
    of a tier's blocks that ``KeepHints`` may protect. ``model``: see ``model_identity``.
    ``needed``: returns the ranks whose folders on disk must stay, or None if not known yet.
    Raises ``ConfigError`` for invalid sizes.
    """
    if not section.kv_host_bytes:
        return None

    def max_kept(capacity_bytes: int) -> int:
        return int(capacity_bytes // cache.block_bytes * kept_share)

    _check_memory(section.kv_host_bytes)
    host = HostTier(section.kv_host_bytes, max_kept(section.kv_host_bytes))
    if section.kv_disk_dir is None:
        return KvTiers(host)
    folder, num_bytes = Path(section.kv_disk_dir), section.kv_disk_bytes

    def open_disk() -> DiskTier:
        claimed = claim_folder(folder, rank)
        _check_disk(num_bytes, claimed)
        disk = DiskTier(claimed, num_bytes, max_kept(num_bytes))
        logger.info("KV blocks on disk: at most %d bytes in %s", num_bytes, claimed.path)
        return disk

    def sweep() -> None:
        if (ranks := needed()) is not None:
            delete_abandoned(folder, ranks, model)

    writer = DiskWriter(host, open_disk, sweep)
    try:
        writer.wait_opened(OPEN_LIMIT_S)
    except ConfigError:
        writer.close()
        raise
    return KvTiers(host, writer)


def _check_memory(host_bytes: int) -> None:
    """Raise ``ConfigError`` if the machine has no more memory than ``host_bytes``."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rule = f"must be less than the memory of the machine ({memory} bytes)"
    check(host_bytes < memory, "kv_host_bytes", host_bytes, rule)


def _check_disk(num_bytes: int, folder: ClaimedFolder) -> None:
    """Release the folder and raise ``ConfigError`` or ``OSError`` if the disk is too small."""
    try:
        size = shutil.disk_usage(folder.path).total
        rule = f"must not exceed the file system of kv_disk_dir ({size} bytes)"
        check(num_bytes <= size, "kv_disk_bytes", num_bytes, rule)
    except (OSError, ConfigError):
        folder.release()
        raise
