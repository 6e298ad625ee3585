"""Which block is given up first."""

from __future__ import annotations

import random

import pytest

from workers.kv.block_pool import BlockPool
from workers.kv.eviction import EvictionOrder
from workers.kv.reuse_rates import NEW_RATE, USED_RATE
from workers.kv.turns import NO_HINTS, KeepHints, Turn

pytestmark = pytest.mark.heavy


def order_of(*chains: str, used_rate: float = USED_RATE) -> EvictionOrder:
    """Free blocks, named by letters, each chain's end freed first."""
    order = EvictionOrder(used_rate)
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


def serve(order: EvictionOrder, chain: str, hints: KeepHints = NO_HINTS) -> Turn:
    """A request uses blocks that are free, or unknown, and leaves them."""
    turn = order.begin(names(chain), hints)
    known = {*order.free}
    for place, name in enumerate(names(chain)):
        if name in known:
            order.hold(name)
            order.find(name)
        else:
            order.learn(name, names(chain)[place - 1] if place else None)
    for name in reversed(names(chain)):
        order.release(name, turn)
    order.end(turn)
    order.check_integrity([])
    return turn


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
    order = order_of("a", "b", used_rate=NEW_RATE)
    order.hold(b"a")
    order.find(b"a")
    order.release(b"a")
    order.learn(b"c", None)
    order.release(b"c")
    assert given_up(order) == "bac"


@pytest.mark.parametrize(
    ("keep_s", "is_found", "given"),
    [
        (None, False, "ab"),
        (0.0, False, "ab"),
        (0.0, True, "ba"),
        (60.0, False, "ba"),
        (60.0, True, "ba"),
    ],
)
def test_what_another_still_holds_keeps_the_hints_of_its_turn(
    keep_s: float | None, is_found: bool, given: str
) -> None:
    """a is copied when its request ends, and another request may have found it."""
    order = EvictionOrder(max_kept=1)
    order.learn(b"a", None)
    turn = order.begin(names("a"), KeepHints(keep_s=keep_s))
    if is_found:
        order.find(b"a")
    order.leave(b"a", turn)
    order.end(turn)
    order.learn(b"b", None)
    order.release(b"b")
    order.release(b"a")
    order.check_integrity([])
    assert order.num_kept == (keep_s == 60.0)
    assert given_up(order) == given


def test_what_was_lent_goes_first_but_not_where_others_build_on_it() -> None:
    order = order_of("abcd", "abxy", "q")
    order.mark_duplicated(names("abcd"))
    assert given_up(order) == "dcyxbaq"
    order = order_of("q", "abcd")
    order.mark_duplicated(names("abc"))  # its own end builds on it
    assert given_up(order) == "qdcba"
    order = order_of("q", "abcd")
    order.mark_duplicated(names("abcd"))
    assert given_up(order) == "dcbaq"


def test_a_lent_block_that_is_found_again_is_kept() -> None:
    order = order_of("q", "ab")
    order.mark_duplicated(names("ab"))
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
    order.mark_duplicated(names("ab"))
    assert order.free == [b"q"]
    for name in reversed(names("ab")):
        order.release(name)
    assert given_up(order) == "baq"


def test_a_beginning_with_another_end_is_kept_after_one_end_is_forgotten() -> None:
    order = order_of("ab", "ac", "q")
    order.forget(b"b")
    order.check_integrity([])
    order.mark_duplicated(names("a"))
    assert given_up(order) == "caq"


def test_the_check_sees_a_block_that_is_held_and_free() -> None:
    order = order_of("ab")
    order.check_integrity([])
    with pytest.raises(AssertionError, match="a held block is evictable"):
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
            pool.mark_duplicated(loan[: draw.randint(0, len(loan))])
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


KEEP = KeepHints(keep_s=60.0)
LAST = KeepHints(keep_s=0.0)


def test_turns_go_whole_and_ends_before_beginnings() -> None:
    order = EvictionOrder()
    serve(order, "abc")
    serve(order, "de")
    assert given_up(order) == "cbaed"


def test_a_beginning_that_others_build_on_shares_their_fate() -> None:
    order = EvictionOrder(max_kept=2)
    serve(order, "abcd", KEEP)  # more than may be kept: not kept
    serve(order, "abxy", KEEP)
    assert given_up(order)[:2] == "dc"
    order = EvictionOrder(max_kept=9)
    serve(order, "abc", KEEP)
    serve(order, "abx")  # the beginning is its own now
    serve(order, "q")
    assert given_up(order) == "xqcba"


def test_a_turn_that_continues_another_counts_as_half_as_old() -> None:
    order = EvictionOrder()
    assert serve(order, "ab").num_before == 0
    assert serve(order, "abc").num_before == 1
    for letter in "defg":
        serve(order, letter)
    assert given_up(order) == "decbafg", "ages 3 and 2 come before a half of 4"


def test_a_request_that_begins_alike_does_not_continue() -> None:
    order = EvictionOrder()
    serve(order, "abc")
    assert serve(order, "abx").num_before == 0
    assert serve(order, "abxy").num_before == 1
    assert serve(order, "abxz").num_before == 0, "the turn before was continued already"


def test_a_turn_is_known_after_its_blocks_are_gone() -> None:
    order = EvictionOrder()
    serve(order, "ab")
    assert given_up(order) == "ba"
    assert serve(order, "abc").num_before == 1


def test_what_a_request_keeps_goes_last_until_its_time_is_over() -> None:
    order = EvictionOrder(max_kept=4)
    order.advance(100.0)
    serve(order, "ab", KEEP)
    serve(order, "cd")
    assert order.num_kept == 2
    assert given_up(order) == "dcba"
    serve(order, "ab", KEEP)
    serve(order, "cd")
    order.advance(159.0)
    assert order.num_kept == 2
    order.advance(160.0)
    assert order.num_kept == 0
    assert given_up(order) == "badc"


def test_what_nobody_will_use_again_goes_first_but_for_what_others_use() -> None:
    order = EvictionOrder()
    serve(order, "ab")
    serve(order, "q")
    serve(order, "abxy", LAST)
    assert given_up(order) == "yxqba"


def test_the_tenant_with_the_most_kept_blocks_gives_some_up() -> None:
    order = EvictionOrder(max_kept=4)
    serve(order, "ab", KeepHints(tenant="A", keep_s=60.0))
    serve(order, "cd", KeepHints(tenant="A", keep_s=60.0))
    serve(order, "e", KeepHints(tenant="B", keep_s=60.0))
    assert order.num_kept == 3
    assert given_up(order) == "badce"


def test_of_one_tenant_the_lowest_priority_is_given_up_first() -> None:
    order = EvictionOrder(max_kept=4)
    serve(order, "a", KeepHints(keep_s=60.0, priority=1))
    serve(order, "b", KeepHints(keep_s=60.0, priority=5))
    serve(order, "c", KeepHints(keep_s=60.0, priority=5))
    serve(order, "d", KeepHints(keep_s=60.0, priority=-1))
    assert given_up(order) == "bcad"


def test_what_is_held_meanwhile_returns_to_its_turn() -> None:
    order = EvictionOrder(max_kept=4)
    serve(order, "ab", KEEP)
    serve(order, "c")
    for name in names("ab"):
        order.hold(name)
    assert order.num_kept == 0
    for name in reversed(names("ab")):
        order.release(name)
    assert order.num_kept == 2
    assert given_up(order) == "cba"


def test_an_order_stays_whole_through_requests_of_all_kinds() -> None:
    draw = random.Random(3)
    order = EvictionOrder(max_kept=20)
    held: list[tuple[list[bytes], Turn]] = []
    counts: dict[bytes, int] = {}
    now_s = 0.0
    for _ in range(3000):
        now_s += draw.random()
        order.advance(now_s)
        if draw.random() < 0.5 and held:
            chain, turn = held.pop(draw.randrange(len(held)))
            has_ended = draw.random() < 0.8
            for name in reversed(chain):
                counts[name] -= 1
                if not counts[name]:
                    order.release(name, turn if has_ended else None)
            if has_ended:
                order.end(turn)
        elif len(held) < 5:
            kind, length = draw.randrange(12), draw.randint(1, 12)
            owners = [kind // 4] * 3 + [kind] * length  # some begin alike
            chain = [b"%d/%d" % (owners[j], j) for j in range(length)]
            keep_s = draw.choice((None, None, 0.0, 5.0, 50.0))
            hints = KeepHints(
                tenant=draw.choice("AB"),
                session=draw.choice(("", "s")),
                keep_s=keep_s,
                priority=draw.randint(-1, 1),
            )
            turn = order.begin(chain, hints)
            known = {*order.free} | {name for name, n in counts.items() if n}
            for place, name in enumerate(chain):
                if name not in known:
                    order.learn(name, chain[place - 1] if place else None)
                else:
                    if not counts.get(name):
                        order.hold(name)
                    order.find(name)
                counts[name] = counts.get(name, 0) + 1
            held.append((chain, turn))
        while len(order.free) > 40:
            gone = order.pop()
            order.forget(gone)
        order.check_integrity([name for name, n in counts.items() if n])
    assert order.num_kept > 0


def test_what_was_learned_decides_between_kinds() -> None:
    order = EvictionOrder()
    for number in range(300):  # chats go on at once, documents never
        for turn in range(3):
            chain = [b"%d/%d" % (number, place) for place in range(turn + 1)]
            _leave(order, chain)
        for place in range(40):
            _leave(order, [b"document %d/%d" % (number, place)])
        while len(order.free) > 400:
            order.forget(order.pop())
    found = {name for name in order.free if not name.startswith(b"document")}
    numbers = {int(name.partition(b"/")[0]) for name in found}
    assert len(numbers) > 50, "an order by age alone has the last 10 chats"


def _leave(order: EvictionOrder, chain: list[bytes]) -> None:
    """A request that finds the blocks that are there, and leaves all of its own."""
    turn, known = order.begin(chain), {*order.free}
    for place, name in enumerate(chain):
        if name in known:
            order.hold(name)
            order.find(name)
        else:
            order.learn(name, chain[place - 1] if place else None)
    for name in reversed(chain):
        order.release(name, turn)
    order.end(turn)
