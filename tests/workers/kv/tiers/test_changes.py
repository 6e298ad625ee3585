"""A block is gone for gateways once neither the pool nor a tier has it."""

from __future__ import annotations

from tests.workers.kv.tiers.test_host import BLOCK_BYTES, leave, names_of, use_of
from workers.kv.block_pool import BlockPool, HashChanges
from workers.kv.tiers.changes import held_changes
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.tiers import KvTiers


def compute(pool: BlockPool, chain: str) -> None:
    """The pool has this prefix, without a holder."""
    names = names_of(chain)
    blocks = pool.allocate(len(names))
    for place, (block, name) in enumerate(zip(blocks, names, strict=True)):
        pool.store(block, name, names[place - 1] if place else None)
    pool.release(blocks)


def take(pool: BlockPool, tiers: KvTiers) -> HashChanges:
    return held_changes(pool.take_changes(), pool, tiers)


def test_a_block_is_held_while_a_tier_has_it() -> None:
    pool, tiers = BlockPool(2), KvTiers(HostTier(3 * BLOCK_BYTES))
    known = set[bytes]()

    def follow() -> None:
        changes = take(pool, tiers)
        known.difference_update(changes.removed)
        known.update(changes.stored)

    compute(pool, "ab")
    follow()
    assert known == set(names_of("ab"))
    leave(tiers, use_of("ab"))
    compute(pool, "xy")
    follow()
    assert known == {*names_of("ab"), *names_of("xy")}
    leave(tiers, use_of("xy"))  # "ab" gives up one block
    follow()
    assert known == {*names_of("a"), *names_of("xy")}
    compute(pool, "uv")
    follow()
    assert known == {*names_of("a"), *names_of("xy"), *names_of("uv")}
    tiers.forget(names_of("xy"))
    follow()
    assert known == {*names_of("a"), *names_of("uv")}


def test_what_came_from_elsewhere_is_named() -> None:
    pool, tiers = BlockPool(2), KvTiers(HostTier(3 * BLOCK_BYTES))
    leave(tiers, use_of("ab"))
    assert take(pool, tiers) == HashChanges(stored=tuple(names_of("ab")), removed=())
    assert take(pool, tiers) == HashChanges(stored=(), removed=())
