"""Block accounting: exact under any sequence of allocate, share, store, forget and release."""

from __future__ import annotations

import random

import pytest

from tests.workers.kv.hashes import hashes_of
from workers.kv.block_pool import BlockPool
from workers.requests.block_hash import chain_hash, request_root, root_hash
from workers.requests.request import Request, SamplingParams


def name(number: int) -> bytes:
    """A hash for tests that need no tokens."""
    return number.to_bytes(32, "big")


def fill(pool: BlockPool, *numbers: int) -> list[int]:
    """A table of blocks that hold ``numbers``, released at once."""
    table = pool.allocate(len(numbers))
    for block, number in zip(table, numbers, strict=True):
        pool.store(block, name(number))
    pool.release(table)
    return table


def test_blocks_are_counted_through_a_random_run() -> None:
    rng = random.Random(7)
    pool = BlockPool(40)
    tables: list[list[int]] = []
    known: set[bytes] = set()  # what a reader of the changes believes
    for _ in range(4000):
        actions = ("allocate", "share", "grow", "release", "find", "store", "forget", "changes")
        action = rng.choice(actions)
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
        elif action == "find":
            found = pool.find(name(rng.randrange(60)) for _ in range(count))
            table = list(dict.fromkeys(found))
            pool.share(table)
            tables += [table] if table else []
        elif action == "store" and tables:
            for block in rng.choice(tables):
                pool.store(block, pool.hash_of(block) or name(rng.randrange(60)))
        elif action == "forget" and tables:
            pool.forget(rng.choice(tables) if rng.random() < 0.5 else [rng.randrange(40)])
        elif action == "changes":
            changes = pool.take_changes()
            assert known.isdisjoint(changes.stored)
            assert known.issuperset(changes.removed)
            known = known - set(changes.removed) | set(changes.stored)
            assert {name(i) for i in range(60) if pool.find([name(i)])} == known
            assert len(known) == len(hashes_of(pool))
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


def test_integrity_check_sees_a_hash_that_leads_astray() -> None:
    pool = BlockPool(2)
    fill(pool, 1, 2)
    pool._by_hash[name(1)] = 0 if pool.find([name(1)]) == [1] else 1
    with pytest.raises(AssertionError, match="hashes and blocks differ"):
        pool.check_integrity([])


def test_a_stored_block_is_found_after_its_release() -> None:
    pool = BlockPool(4)
    table = fill(pool, 1, 2, 3)
    assert pool.num_free == 4
    assert pool.find(map(name, (1, 2, 9, 3))) == table[:2]
    assert pool.find(map(name, (9, 1))) == []
    pool.share(table[:2])
    assert pool.num_free == 2
    pool.check_integrity([table[:2]])


def test_blank_blocks_go_first_then_the_end_of_what_was_held_longest_ago() -> None:
    pool = BlockPool(5)
    first, second = fill(pool, 1, 2), fill(pool, 3, 4)
    assert pool.allocate(1) not in ([b] for b in (*first, *second))
    pool.share(first)
    pool.release(first)  # now the second was held longest ago
    assert pool.allocate(3) == [second[1], second[0], first[1]]
    assert pool.find([name(1)]) == [first[0]]
    assert len(hashes_of(pool)) == 1


def test_blocks_that_another_worker_has_too_go_first() -> None:
    pool = BlockPool(5)
    table = pool.allocate(3)
    for block, number in zip(table[:2], (1, 2), strict=True):  # the third is not full
        pool.store(block, name(number))
    fill(pool, 3, 4)
    pool.mark_duplicated(table)
    pool.release(table)
    assert pool.allocate(3) == [table[2], table[1], table[0]]
    assert len(pool.find([name(3), name(4)])) == 2


def test_the_same_contents_computed_twice_are_found_once() -> None:
    pool = BlockPool(4)
    one, other = pool.allocate(2), pool.allocate(2)
    for table in (one, other):
        for place, block in enumerate(table):
            pool.store(block, name(place))
    assert pool.find([name(0), name(1)]) == one
    pool.release(one)
    pool.check_integrity([other])
    pool.release(other)
    pool.check_integrity([])
    assert pool.allocate(2) == other[::-1]  # they are blank
    assert pool.find([name(0), name(1)]) == one


def test_forgotten_blocks_are_not_found_but_stay_with_their_holders() -> None:
    pool = BlockPool(3)
    table = pool.allocate(1)
    pool.store(table[0], name(1))
    free = fill(pool, 2)
    pool.forget([*table, *free])
    assert pool.find([name(1)]) == pool.find([name(2)]) == []
    pool.check_integrity([table])
    pool.store(table[0], name(3))
    assert pool.find([name(3)]) == table


def test_changes_name_what_is_new_and_what_is_gone() -> None:
    pool = BlockPool(2)
    fill(pool, 1, 2)
    changes = pool.take_changes()
    assert (changes.stored, changes.removed) == ((name(1), name(2)), ())
    fill(pool, 3)  # 2 goes, the end of the first table
    fill(pool, 4)  # 1 goes
    fill(pool, 1)  # 3 goes, which was never reported; 1 is back
    changes = pool.take_changes()
    assert (changes.stored, changes.removed) == ((name(4),), (name(2),))
    assert pool.take_changes().stored == ()


def test_hashes_cover_salt_position_and_every_token() -> None:
    hashes = [root_hash(""), root_hash("a"), root_hash("b"), root_hash("", "a"), root_hash("", "b")]
    for root in tuple(hashes):
        for tokens in ((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3), (4, 3, 2, 1)):
            first = chain_hash(root, tokens)
            hashes += [first, chain_hash(first, tokens)]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 32 for h in hashes)
    assert chain_hash(root_hash("a"), (1, 2)) == chain_hash(root_hash("a"), [1, 2])


def test_hashes_are_the_same_in_every_process() -> None:
    """An index of prefixes holds the reports of several workers."""
    known = chain_hash(root_hash("tenant"), (1, 2, 50303))
    assert known.hex() == "a937842d78963777663658bfbefd89c1a3e9007e1135957d27bdb05e9e0a5681"
    request = Request(request_id="r", prompt=(1, 2, 3), params=SamplingParams(), cache_salt="s")
    assert request_root(request, None) == request_root(request, 3) == root_hash("s")
    assert request_root(request, 2) == root_hash("s", length=3)
    assert root_hash("s", length=3).hex() == (
        "8f8e23e3312598319462105803ef6cde40336669814b9ae0bc8da80360e33c9c"
    )


def test_a_block_that_was_shared_is_kept_for_twice_as_long() -> None:
    pool = BlockPool(6)
    a, b, c, d, e, f = blocks = pool.allocate(6)
    for block in blocks:
        pool.store(block, bytes([block]) * 32)
    for block in (a, b, c, d):
        pool.release([block])
    pool.share([a])
    for block in (a, e, f):
        pool.release([block])
    assert pool.allocate(6) == [b, c, d, e, a, f]
