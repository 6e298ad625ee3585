"""Changes of a worker's blocks in pool and tiers, as reported to gateways."""

from __future__ import annotations

from workers.kv.block_pool import BlockPool, HashChanges
from workers.kv.tiers.tiers import KvTiers


def held_changes(changes: HashChanges, pool: BlockPool, tiers: KvTiers) -> HashChanges:
    """Return the ``changes`` of the pool merged with the changes of the tiers.

    A block is removed when neither the pool nor a tier has it. A block may be reported as stored
    repeatedly. Engine thread only.
    """
    touched = tiers.take_touched()  # before has(): later changes are taken by the next call
    elsewhere = [name for name in touched if not pool.is_known(name)]
    removed = (*changes.removed, *elsewhere)
    return HashChanges(
        stored=(*changes.stored, *(name for name in elsewhere if tiers.has(name))),
        removed=tuple(dict.fromkeys(name for name in removed if not tiers.has(name))),
    )
