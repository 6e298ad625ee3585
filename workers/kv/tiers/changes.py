"""What gateways learn of a worker's blocks, wherever the worker has them."""

from __future__ import annotations

from workers.kv.block_pool import BlockPool, HashChanges
from workers.kv.tiers.tiers import KvTiers


def held_changes(changes: HashChanges, pool: BlockPool, tiers: KvTiers) -> HashChanges:
    """``changes`` of the pool, as those of pool and tiers: a block is gone once nothing has it.

    Engine's thread. A block that was stored before may be named again.
    """
    touched = tiers.take_touched()  # before a look at what is there: later ones come next time
    elsewhere = [name for name in touched if not pool.is_known(name)]
    removed = (*changes.removed, *elsewhere)
    return HashChanges(
        stored=(*changes.stored, *(name for name in elsewhere if tiers.has(name))),
        removed=tuple(dict.fromkeys(name for name in removed if not tiers.has(name))),
    )
