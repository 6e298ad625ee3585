"""Block accounting: exact under any sequence of allocate, share and release."""

from __future__ import annotations

import random

import pytest

from workers.kv_blocks import BlockPool


def test_blocks_are_counted_through_a_random_run() -> None:
    rng = random.Random(7)
    pool = BlockPool(40)
    tables: list[list[int]] = []
    for _ in range(2000):
        action = rng.choice(("allocate", "share", "grow", "release"))
        count = rng.randint(1, 6)
        if action == "allocate" and pool.can_allocate(count):
            tables.append(pool.allocate(count))
        elif action == "share" and tables:
            source = rng.choice(tables)
            shared = source[: rng.randint(1, len(source))]
            pool.share(shared)
            tables.append(list(shared))
        elif action == "grow" and tables and pool.can_allocate(count):
            rng.choice(tables).extend(pool.allocate(count))
        elif action == "release" and tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check_integrity(tables)
        held = {block for table in tables for block in table}
        assert pool.num_free == pool.num_blocks - len(held)
    for table in tables:
        pool.release(table)
    assert pool.num_free == pool.num_blocks


def test_shared_block_is_free_after_its_last_holder() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.release([block])
    assert not pool.is_free(block)
    pool.release([block])
    assert pool.is_free(block)


def test_query_does_not_allocate() -> None:
    pool = BlockPool(3)
    assert pool.can_allocate(3)
    assert not pool.can_allocate(4)
    assert pool.num_free == 3


def test_releasing_a_free_block_is_our_mistake() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="free already"):
        pool.release([0])


def test_integrity_check_sees_a_leak() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="holders differ"):
        pool.check_integrity([])
