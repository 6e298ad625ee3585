"""The index of prefixes: equal to plain sets, in any order of events."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from gateway.engines import kv_index
from gateway.engines.kv_index import KvIndex
from workers.kv import events
from workers.kv.block_pool import BlockPool, HashChanges
from workers.kv.events import KvFeed
from workers.requests.block_hash import SHORT_BYTES, KvEvents, prompt_hashes
from workers.requests.request import Request, SamplingParams


def _names(first: int, count: int) -> list[bytes]:
    return [i.to_bytes(SHORT_BYTES, "big") for i in range(first, first + count)]


def _whole(*names: bytes) -> KvEvents:
    return KvEvents(number=7, is_whole=True, stored=names)


def test_each_worker_matches_as_far_as_its_blocks_go() -> None:
    index, prompt = KvIndex(), _names(0, 100)
    ends = {"a": 100, "b": 99, "c": 16, "d": 17, "e": 1, "f": 0}
    for worker, end in ends.items():
        index.apply(worker, _whole(*prompt[:end], *_names(1000, 3)))
    assert index.matches(prompt) == {worker: end for worker, end in ends.items() if end}
    assert index.matches([]) == index.matches(_names(500, 4)) == {}
    assert index.num_blocks == 103


def test_missed_messages_ask_for_the_complete_list() -> None:
    index, prompt = KvIndex(), _names(0, 4)
    assert not index.apply("a", KvEvents(number=1, stored=tuple(prompt)))
    assert index.apply("a", _whole(*prompt[:2]))
    assert index.apply("a", KvEvents(number=8, stored=(prompt[2],)))
    assert not index.apply("a", KvEvents(number=10, stored=(prompt[3],)))
    assert index.apply("a", KvEvents(number=11, stored=(prompt[3],))), "it is asked for once"
    assert index.matches(prompt) == {"a": 3}
    assert index.apply("a", KvEvents(number=12, is_whole=True, stored=(prompt[0],)))
    assert index.matches(prompt) == {"a": 1}
    assert index.apply("a", KvEvents(number=13, removed=(prompt[0], prompt[3])))
    assert index.matches(prompt) == {}
    assert not index.num_blocks
    assert not index.apply("a", KvEvents(number=15))
    index.drop("a")
    assert not index.apply("a", KvEvents(number=16)), "it may be another process"


def test_what_was_routed_is_expected_until_it_is_settled() -> None:
    index, prompt = KvIndex(), _names(0, 4)
    index.apply("a", _whole())
    index.expect("a", prompt)
    index.expect("a", prompt[:2])
    index.end_expectation("a", prompt)
    assert index.matches(prompt) == {"a": 2}
    index.apply("a", KvEvents(number=8, stored=tuple(prompt[:1])))
    index.end_expectation("a", prompt[:2])
    assert index.matches(prompt) == {"a": 1}
    index.expect("a", prompt)
    index.apply("a", KvEvents(number=9, removed=tuple(prompt[:1])))
    assert index.matches(prompt) == {"a": 4}
    index.drop("a")
    index.end_expectation("a", prompt)
    assert not index.num_blocks


def test_what_is_routed_before_the_first_message_is_settled_alone() -> None:
    """The requests of a lost worker are sent as soon as another worker has connected."""
    index, prompt = KvIndex(), _names(0, 4)
    index.expect("a", prompt)
    assert index.matches(prompt) == {"a": 4}
    assert not index.apply("a", KvEvents(number=1, stored=tuple(prompt)))
    index.apply("a", _whole())
    index.expect("a", prompt)
    index.end_expectation("a", prompt)
    assert index.matches(prompt) == {"a": 4}
    index.end_expectation("a", prompt)
    assert not index.num_blocks


def test_each_expectation_is_settled_once() -> None:
    index, prompt = KvIndex(), _names(0, 4)
    index.apply("a", _whole())
    for _ in range(3):
        index.expect("a", prompt)
    index.end_expectation("a", prompt)
    index.end_expectation("a", prompt)
    assert index.matches(prompt) == {"a": 4}
    index.end_expectation("a", prompt)
    assert index.matches(prompt) == {}


def test_settling_at_a_worker_that_left_and_came_back_changes_nothing() -> None:
    index, prompt = KvIndex(), _names(0, 4)
    for worker in ("a", "b"):
        index.apply(worker, _whole())
    index.expect("b", prompt)
    index.drop("b")
    index.apply("b", _whole())
    index.end_expectation("b", prompt)
    assert not index.num_blocks


@pytest.mark.parametrize(
    ("reported", "expected", "best"),
    [
        ({"a": 2, "b": 1}, {"a": 3}, ("a", 2)),
        ({"a": 0, "b": 1}, {"a": 3}, ("b", 1)),
        ({"a": 1, "b": 3}, {"a": 4}, ("b", 3)),
        ({"a": 2, "b": 2}, {"a": 3}, ("a", 2)),  # and will soon have a third
        ({"a": 0}, {"a": 3}, ("", 0)),
        ({"a": 0}, {}, ("", 0)),
    ],
)
def test_the_best_holder_has_reported_the_longest_prefix(
    reported: dict[str, int], expected: dict[str, int], best: tuple[str, int]
) -> None:
    index, prompt = KvIndex(), _names(0, 4)
    for worker, depth in reported.items():
        index.apply(worker, _whole(*prompt[:depth]))
    for worker, depth in expected.items():
        index.expect(worker, prompt[:depth])
    assert index.best_holder(prompt, index.matches(prompt)) == best


def test_the_place_of_a_lost_worker_is_taken_by_the_next_one() -> None:
    index, prompt = KvIndex(), _names(0, 4)
    for worker in ("a", "b"):
        index.apply(worker, _whole(*prompt))
    index.drop("a")
    index.apply("c", _whole(prompt[0]))
    assert index.matches(prompt) == {"b": 4, "c": 1}


def test_it_follows_the_pools_of_several_workers() -> None:
    draw = random.Random(3)
    index = KvIndex()
    pools = {worker: BlockPool(40) for worker in "abc"}
    feeds = {worker: KvFeed() for worker in "abc"}
    for worker, feed in feeds.items():
        assert all(index.apply(worker, events) for events in feed.whole())
    prompts = [[f"{i}/{j}".encode().ljust(32) for j in range(12)] for i in range(10)]
    for _ in range(400):
        worker, prompt = draw.choice("abc"), draw.choice(prompts)
        pool, feed = pools[worker], feeds[worker]
        table = pool.find(prompt[: draw.randint(1, 12)])
        pool.share(table)
        table += pool.allocate(draw.randint(0, 12 - len(table)))
        for block, name in zip(table, prompt, strict=False):
            pool.store(block, name)
        pool.release(table)
        events = feed.change(pool.take_changes())
        is_missed = draw.random() < 0.1
        if is_missed or not index.apply(worker, events):
            assert all(index.apply(worker, events) for events in feed.whole())
        for prompt in prompts:
            expected = {w: len(p.find(prompt)) for w, p in pools.items() if p.find(prompt)}
            assert index.matches([name[:SHORT_BYTES] for name in prompt]) == expected


def test_it_equals_plain_sets_while_blocks_of_dropped_workers_are_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_index, "_REMOVED_AT_A_TIME", 3)
    draw, index, sets = random.Random(5), KvIndex(), dict[str, set[bytes]]()
    numbers = dict[str, int]()
    prompts = [_names(100 * i, 40) for i in range(6)]
    for _ in range(1500):
        worker, prompt, depth = draw.choice("abcd"), draw.choice(prompts), draw.randint(0, 40)
        known = sets.get(worker)
        kind = draw.choice(["whole", "drop", "store", "store", "store", "remove", "remove"])
        if kind == "drop":
            index.drop(worker)
            sets.pop(worker, None)
        elif kind == "whole":
            assert index.apply(worker, _whole(*prompt[:depth]))
            sets[worker], numbers[worker] = set(prompt[:depth]), 7
        elif known is not None:
            numbers[worker] += 1
            removed = [name for name in prompt[depth:] if name in known] * (kind == "remove")
            stored = prompt[:depth] if kind == "store" else []
            changes = KvEvents(number=numbers[worker], stored=tuple(stored), removed=tuple(removed))
            assert index.apply(worker, changes)
            known.difference_update(removed)
            known.update(stored)
        for prompt in prompts:
            depths = {w: _depth(prompt, blocks) for w, blocks in sets.items()}
            assert index.matches(prompt) == {w: depth for w, depth in depths.items() if depth}
    for worker in "abcd":
        index.drop(worker)
    while index._dropped:
        index._remove_dropped()
    assert index.num_blocks == index._used_bits == 0


def _depth(prompt: Sequence[bytes], blocks: set[bytes]) -> int:
    return next((i for i, name in enumerate(prompt) if name not in blocks), len(prompt))


def test_the_end_of_a_large_worker_removes_few_blocks_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_index, "_REMOVED_AT_A_TIME", 100)
    index, blocks = KvIndex(), _names(0, 1000)
    for worker in "ab":
        index.apply(worker, _whole(*blocks))
    index.apply("b", KvEvents(number=8, removed=tuple(blocks)))
    index.drop("a")
    assert index.matches(blocks) == {}
    assert index.num_blocks == 900
    for number in range(9, 18):
        index.apply("b", KvEvents(number=number))
    assert not index.num_blocks


def test_a_full_list_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_BLOCKS_PER_MESSAGE", 16)
    feed, index, names = KvFeed(), KvIndex(), _names(0, 100)
    stored = HashChanges(stored=tuple(name.ljust(32) for name in names), removed=())
    feed.change(stored)
    parts = feed.whole()
    assert [len(part.stored) for part in parts] == [16] * 6 + [4]
    assert [part.is_whole for part in parts] == [True] + [False] * 6
    assert all(index.apply("a", part) for part in parts)
    assert index.matches(names) == {"a": 100}
    assert index.apply("a", feed.change(HashChanges(stored=(), removed=stored.stored[50:])))
    assert index.matches(names) == {"a": 50}


def test_prompts_have_blocks_in_common_as_far_as_they_are_alike() -> None:
    def names(prompt: Sequence[int], salt: str = "") -> list[bytes]:
        request = Request(
            request_id="r", prompt=tuple(prompt), params=SamplingParams(), cache_salt=salt
        )
        return prompt_hashes(request, 4, length_matters_above=100)

    first = names(range(11))
    assert len(first) == 2
    assert names(range(12))[:2] == first
    assert names([*range(4), 9, 9, 9, 9])[0] == first[0]
    assert names([*range(4), 9, 9, 9, 9])[1] != first[1]
    assert set(names(range(11), "tenant")).isdisjoint(first)
    assert names(range(101))[0] != names(range(102))[0] != names(range(100))[0] == first[0]
