from __future__ import annotations

from workers.kv.block_pool import BlockPool
from workers.requests.block_hash import BlockHash


def hashes_of(pool: BlockPool) -> set[BlockHash]:
    """Hashes by which blocks can be found."""
    found = {pool.hash_of(block) for block in range(pool.num_blocks)}
    return {block_hash for block_hash in found if block_hash is not None}
