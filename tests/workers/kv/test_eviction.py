"""Which block is given up first."""

from __future__ import annotations

import random

import pytest

from workers.kv.block_pool import BlockPool
from workers.kv.eviction import EvictionOrder


def order_of(*chains: str, used_age: float = 0.5) -> EvictionOrder:
    """Free blocks, named by letters, each chain's end freed first."""
    order = EvictionOrder(used_age)
    for chain in chains:
        parent = None
        for letter in chain:
            if letter.encode() not in order.free:
                order.learn(letter.encode(), parent)
            order.hold(letter.encode())
            parent = letter.encode()
        for letter in reversed(chain):
            order.release(letter.encode())
    return order


def given_up(order: EvictionOrder) -> str:
    """All of them, in the order of their end."""
    found = ""
    while order.free:
        name = order.pop()
        order.forget(name)
        found += name.decode()
    return found


def names(chain: str) -> list[bytes]:
    return [letter.encode() for letter in chain]


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    assert given_up(order_of("abc", "de")) == "cbaed"
    assert given_up(order_of("abc", "de", "ab")) == "cedba"


def test_what_was_found_counts_as_half_as_old() -> None:
    order = order_of("abcdef")
    order.find(b"f")  # while it is free: its place is what it was
    assert given_up(order)[0] == "f"
    order = order_of("a", "b", "c", "d")
    for name in names("a"):
        order.hold(name)
        order.find(name)
        order.release(name)
    order.learn(b"e", None)
    order.release(b"e")
    order.learn(b"f", None)
    order.release(b"f")
    assert given_up(order) == "bcdeaf"


def test_a_block_was_found_until_it_has_other_contents() -> None:
    order = order_of("ab")
    assert not order.was_found(b"a")
    order.find(b"a")
    assert order.was_found(b"a")
    assert not order.was_found(b"b")
    order.forget(b"b")
    order.forget(b"a")
    assert not order.was_found(b"a")


def test_without_weights_it_is_a_plain_lru() -> None:
    order = order_of("a", "b", used_age=1.0)
    order.hold(b"a")
    order.find(b"a")
    order.release(b"a")
    order.learn(b"c", None)
    order.release(b"c")
    assert given_up(order) == "bac"


def test_what_was_lent_goes_first_but_not_where_others_build_on_it() -> None:
    order = order_of("abcd", "abxy", "q")
    order.lend(names("abcd"))
    assert given_up(order) == "dcyxbaq"
    order = order_of("q", "abcd")
    order.lend(names("abc"))  # its own end builds on it
    assert given_up(order) == "qdcba"
    order = order_of("q", "abcd")
    order.lend(names("abcd"))
    assert given_up(order) == "dcbaq"


def test_a_lent_block_that_is_found_again_is_kept() -> None:
    order = order_of("q", "ab")
    order.lend(names("ab"))
    for name in names("ab"):
        order.hold(name)
        order.find(name)
    for name in reversed(names("ab")):
        order.release(name)
    assert given_up(order) == "qba"


def test_a_held_block_that_is_lent_goes_first_when_it_is_free() -> None:
    order = order_of("q", "ab")
    for name in names("ab"):
        order.hold(name)
    order.lend(names("ab"))
    assert order.free == [b"q"]
    for name in reversed(names("ab")):
        order.release(name)
    assert given_up(order) == "baq"


def test_a_beginning_with_another_end_is_kept_after_one_end_is_forgotten() -> None:
    order = order_of("ab", "ac", "q")
    order.forget(b"b")
    order.check_integrity([])
    order.lend(names("a"))
    assert given_up(order) == "caq"


def test_the_check_sees_a_block_that_is_held_and_free() -> None:
    order = order_of("ab")
    order.check_integrity([])
    with pytest.raises(AssertionError, match="may be given up"):
        order.check_integrity([b"a"])
    order.hold(b"a")
    with pytest.raises(AssertionError, match="not all blocks"):
        order.check_integrity([])


def test_a_pool_keeps_its_order_through_loans() -> None:
    draw = random.Random(5)
    pool = BlockPool(60)
    chains = [[f"{i}/{j}".encode().ljust(32) for j in range(10)] for i in range(12)]
    loans: list[list[int]] = []
    for _ in range(2000):
        chain = draw.choice(chains)[: draw.randint(1, 10)]
        if draw.random() < 0.3:
            loan = pool.find(chain)
            pool.hold(loan)
            loans.append(loan)
        elif loans and draw.random() < 0.5:
            loan = loans.pop(draw.randrange(len(loans)))
            pool.lend(loan[: draw.randint(0, len(loan))])
            pool.release(loan)
        else:
            table = pool.find(chain)
            if not pool.can_allocate(len(chain)):
                continue
            pool.share(table)
            table += pool.allocate(len(chain) - len(table))
            for place, block in enumerate(table):
                pool.store(block, chain[place], chain[place - 1] if place else None)
            pool.release(table)
        pool.check_integrity(loans)
    for loan in loans:
        pool.release(loan)
    pool.check_integrity([])
    assert pool.num_free == 60
