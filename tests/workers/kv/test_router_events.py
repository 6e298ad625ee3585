"""KV events of an engine's scheduler, as a router reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest

from tests.workers.kv.hashes import hashes_of
from tests.workers.kv.router_index import RouterIndex
from tests.workers.scheduling.test_scheduler import Desk
from workers.kv.block_pool import HashChanges
from workers.kv.contents import BlockContents
from workers.kv.router_events import BlockContent, EventBatch, RouterFeed
from workers.kv.transfer.store import KvTransferStore
from workers.requests.block_hash import SHORT_BYTES, BlockHash, block_hashes
from workers.requests.request import SamplingParams

ONE = SamplingParams(max_tokens=1)
SIZE = 4
NAMES = {"key-7": "sql"}


class Told:
    """A desk whose changes go to a router's index after each step."""

    def __init__(self, **more: object) -> None:
        self.desk = Desk(**more)  # type: ignore[arg-type]
        self.contents = BlockContents(
            pool=self.desk.pool,
            block_size=SIZE,
            length_matters_above=self.desk.scheduler.prefixes.length_matters_above,
        )
        self.desk.scheduler.prefixes.contents = self.contents
        self.feed = RouterFeed(SIZE, lambda: NAMES)
        self.index = RouterIndex(SIZE)
        self.num_events = 0

    def tell(self) -> None:
        events = self.feed.change(self.desk.pool.take_changes(), self.contents.take())
        self.num_events += len(events)
        batch = EventBatch(ts=1.5, events=events, data_parallel_rank=1)
        self.index.apply(msgspec.msgpack.encode(batch))

    def serve(self, prompt_length: int, params: SamplingParams = ONE, **more: object) -> None:
        """Run a request to its end."""
        self.desk.add(prompt_length, params, **more)  # type: ignore[arg-type]
        while self.desk.scheduler.queues.running or self.desk.scheduler.queues.waiting:
            self.desk.commit(self.desk.plan())
            self.tell()


def names(hashes: Sequence[BlockHash]) -> set[int]:
    return {int.from_bytes(block_hash[:SHORT_BYTES], "big") for block_hash in hashes}


def test_a_router_knows_the_tokens_of_every_cached_prefix() -> None:
    told = Told()
    told.serve(14, first_token=100)
    told.serve(9, first_token=100)
    assert told.index.blocks.keys() == names([*hashes_of(told.desk.pool)])
    prompt = max(told.index.prefixes(), key=len)
    assert [len(p) for p in sorted(told.index.prefixes(), key=len)] == [4, 8, 12]
    assert all(prompt[: len(p)] == p for p in told.index.prefixes())
    assert told.index.ranks == {1}
    assert told.num_events == 1, "the second request stored nothing new"


@pytest.mark.parametrize("seed", range(4))
def test_a_router_follows_evictions(seed: int) -> None:
    """Few blocks and many prompts: what is gone is gone, and nothing is told twice."""
    told, rng = Told(num_blocks=9), random.Random(seed)
    num_removed = 0
    for _ in range(60):
        before = len(told.index.blocks)
        told.serve(rng.randrange(1, 24), first_token=rng.choice((100, 200, 300, 400)))
        num_removed += len(told.index.blocks) < before
        assert told.index.blocks.keys() == names([*hashes_of(told.desk.pool)])
    assert num_removed > 0


def test_what_names_a_block_beside_its_tokens_is_told() -> None:
    told = Told(length_matters_above=10)
    told.serve(9, first_token=100, cache_salt="tenant\0salt")
    told.serve(9, first_token=100, adapter="key-7")
    told.serve(9, first_token=100, adapter="key-8")
    told.serve(12, first_token=100)
    extra = {keys for _, keys in told.index.blocks.values()}
    assert extra == {
        (None, "tenant\0salt"),
        ("sql", "sql"),
        ("sql", "sql", "sql"),
        ("key-8", "key-8"),
        ("key-8", "key-8", "key-8"),
        (None, "length 12"),
    }


def test_a_block_from_another_worker_is_told_of_when_it_is_used() -> None:
    told = Told()
    (sequence,) = told.desk.add(14, ONE, first_token=100)
    request = sequence.request
    told.desk.scheduler.remove(sequence)
    hashes = block_hashes(request, SIZE, None)
    store = KvTransferStore(told.desk.pool, _NoCache(), contents=told.contents)  # type: ignore[arg-type]
    fetch = store.begin(hashes, [], num_spare=0)
    assert fetch is not None
    fetch.num_filled = 2
    store.end(fetch)
    told.tell()
    assert told.index.blocks == {}, "nobody here knows its tokens"
    told.serve(14, first_token=100)
    assert told.index.blocks.keys() == names(hashes)
    assert {len(p) for p in told.index.prefixes()} == {4, 8, 12}


class _NoCache:
    """In place of ``KVCache``."""

    def __init__(self) -> None:
        self.side = self

    def follow(self) -> None:
        """See ``SideStream``."""

    def clear(self, blocks: list[int]) -> None:
        assert blocks == []


def _changes(stored: str = "", removed: str = "") -> HashChanges:
    return HashChanges(stored=tuple(map(_hash, stored)), removed=tuple(map(_hash, removed)))


def _hash(letter: str) -> BlockHash:
    return letter.encode() * 32


def _contents(chain: str) -> dict[BlockHash, BlockContent]:
    parents = [None, *map(_hash, chain)]
    return {
        _hash(letter): BlockContent(parent=parent, token_ids=(ord(letter),) * SIZE)
        for letter, parent in zip(chain, parents, strict=False)
    }


def test_a_chain_is_one_event_and_another_parent_begins_the_next() -> None:
    feed = RouterFeed(SIZE)
    contents = _contents("abc") | _contents("xy")
    (first, second) = feed.change(_changes("abcxy"), contents)
    assert msgspec.to_builtins(first) == {
        "type": "BlockStored",
        "block_hashes": [int.from_bytes(letter * 8, "big") for letter in (b"a", b"b", b"c")],
        "parent_block_hash": None,
        "token_ids": [97] * 4 + [98] * 4 + [99] * 4,
        "block_size": 4,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    assert msgspec.to_builtins(second)["token_ids"] == [120] * 4 + [121] * 4


def test_blocks_that_routers_never_heard_of_are_not_removed() -> None:
    feed = RouterFeed(SIZE)
    assert feed.change(_changes("ab"), _contents("a")) != []
    (removed,) = feed.change(_changes(removed="ab"), {})
    assert msgspec.to_builtins(removed)["block_hashes"] == [int.from_bytes(b"a" * 8, "big")]
    assert feed.change(_changes(), _contents("ab")) == []


def test_after_a_clearing_only_what_is_new_is_known() -> None:
    feed = RouterFeed(SIZE)
    feed.change(_changes("a"), _contents("a"))
    assert msgspec.to_builtins(feed.clear()) == [{"type": "AllBlocksCleared"}]
    assert feed.change(_changes(removed="a"), {}) == []
    assert len(feed.change(_changes("b"), _contents("ab"))) == 1
