"""The lower tiers of a worker, as its loop uses them: copies on their way in, restores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.config.kv_tiers import KvTiersSection
from workers.engine.engine import Engine
from workers.kv.block_pool import HashChanges
from workers.kv.cache import KVCache
from workers.kv.tiers.changes import held_changes
from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.folders import claim_folder
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.fetch_cost import FetchCost
from workers.kv.transfer.turn_copies import TurnCopies
from workers.process.intake.kv_restores import KvRestores

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LowerTiers:
    """See the module. All methods belong to the engine's thread but ``stats``."""

    tiers: KvTiers
    copies: TurnCopies
    """What turns leave, on its way in."""
    restores: KvRestores
    """Requests that wait for blocks."""

    @classmethod
    def of(
        cls, tiers: KvTiers, engine: Engine, computing: FetchCost, wake: Callable[[], None]
    ) -> LowerTiers:
        """Begin to fill the tiers; ``wake`` is called, by any thread, when there is work here."""
        copies = engine.keep_in(tiers, wake)
        return cls(tiers, copies, KvRestores(engine, tiers, computing, wake))

    def changes(self, changes: HashChanges, engine: Engine) -> HashChanges:
        """Changes of what pool and tiers hold, for gateways."""
        return held_changes(changes, engine.pool, self.tiers)

    def stats(self) -> dict[str, float]:
        """By metric name without prefix. Any thread may call it."""
        return {**self.tiers.stats(), **self.restores.stats()}

    def close(self) -> None:
        """Copy and restore nothing more; what is on disk stays."""
        self.restores.close()
        self.copies.close()
        self.tiers.close()


def open_tiers(
    section: KvTiersSection, cache: KVCache, kept_share: float, rank: int, identity: str
) -> KvTiers | None:
    """The tiers of one attention worker; None: it has none.

    ``identity``: what the contents of a block depend on, beside its layout. ``kept_share``: of a
    tier's blocks, those that requests may have kept before others. Raises ``ConfigError``.
    """
    if not section.kv_host_bytes:
        return None

    def max_kept(capacity_bytes: int) -> int:
        return int(capacity_bytes // cache.block_bytes * kept_share)

    host = HostTier(section.kv_host_bytes, max_kept(section.kv_host_bytes))
    if section.kv_disk_dir is None:
        return KvTiers(host)
    layout = f"{cache.block_shape} {cache.dtype} {cache.state_shape}"
    folder = claim_folder(Path(section.kv_disk_dir), rank, f"{identity}\n{layout}\n")
    disk = DiskTier(folder, section.kv_disk_bytes, max_kept(section.kv_disk_bytes))
    logger.info("KV blocks on disk: %d bytes in %s", disk.num_bytes, folder.path)
    return KvTiers(host, disk)
