"""Copies of another worker's blocks: what is here already does not come, and nothing waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.harness.engine_stream import TIMEOUT_S, TOKEN
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.core.errors import PeerLostError, ProtocolError, TransferAbortedError
from tests.reference.goldens import Golden
from tests.workers.kv.tiers.test_disk import tiers_of as with_disk
from tests.workers.kv.transfer.test_store import engine_of, forget_states, request_of, serve
from tests.workers.process.intake.test_kv_fetches import identity
from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.folders import claim_folder
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.block_provider import KvBlockProvider, ProvidedItem
from workers.kv.turns import NO_HINTS, TurnUse
from workers.process.intake.copy_fetch import BATCH_BLOCKS, CopyFetch
from workers.process.intake.copy_receiver import OUTCOMES, CopyReceiver
from workers.requests.block_hash import HASH_BYTES, BlockHash, block_hashes, state_key
from workers.requests.request import Request
from workers.requests.wire import KeepCopy
from workers.transport.peer_link import PeerClient, PeerEndpoint, PeerServer

pytestmark = pytest.mark.heavy

LARGE = 1 << 30
FAST = 1e12
"""Bytes a second: no limit in a test."""


def tiers_of(capacity_bytes: int = LARGE) -> KvTiers:
    return KvTiers(HostTier(capacity_bytes))


def names_of(request: Request) -> list[BlockHash]:
    return block_hashes(request, 16, None)


def message_of(names: Sequence[BlockHash], **fields: Any) -> KeepCopy:
    joined = b"".join(names)
    known = KeepCopy(source="attention-0", names=joined, num_prompt=len(names), session="s")
    return replace(known, **fields)


@dataclass
class Source(KvBlockProvider):
    """Lends the blocks of an engine, and notes what it was asked for and what was kept."""

    asked: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    is_asked: threading.Event = field(default_factory=threading.Event)

    def acquire(self, keys: Sequence[bytes]) -> list[ProvidedItem]:
        self.asked.append(len(keys))
        self.is_asked.set()
        return super().acquire(keys)

    def release(self, items: list[ProvidedItem], num_kept: int) -> None:
        self.kept.append(num_kept)
        super().release(items, num_kept)


@dataclass
class Link:
    """A worker with blocks, and how to reach it."""

    engine: LocalEngine
    lender: Source
    peer: PeerEndpoint

    def fetch(self, tiers: KvTiers, message: KeepCopy, **options: Any) -> CopyFetch:
        """Fetch as the thread of another worker does, while this one answers between steps."""
        fetch = CopyFetch(tiers, self.engine.engine.kv_store.cache, message)

        def work() -> None:
            with closing(PeerClient(self.peer, TIMEOUT_S, **options)) as client:
                fetch.run(client)

        with ThreadPoolExecutor(1) as threads:
            future = threads.submit(work)
            while not future.done():
                self.lender.serve_requests()
            future.result()
        self.settle()
        tiers.host.check_integrity()
        return fetch

    def settle(self) -> None:
        """The blocks that were lent are returned, and no other than before are free."""
        while self.engine.engine.kv_store.tables:
            self.lender.serve_requests()
        self.engine.engine.check_integrity()


@contextmanager
def lending(engine: LocalEngine) -> Iterator[Link]:
    me = identity("attention-0")
    server = PeerServer(me, TOKEN, host="127.0.0.1", what="kv-blocks", key_bytes=HASH_BYTES)
    lender = Source(engine.engine.kv_store, lambda: None)
    server.start(lender)
    peer = PeerEndpoint(
        name="attention-0", address=server.address, me=identity("attention-1"), token=TOKEN
    )
    with closing(server):
        yield Link(engine, lender, peer)


def long_request(**fields: object) -> Request:
    """Of 20 full blocks, more than come at once."""
    prompt = tuple(3 + (7 * i) % 90 for i in range((BATCH_BLOCKS + 4) * 16 + 1))
    return request_of("long", prompt=prompt, **fields)


@pytest.fixture
def link(tiny_checkpoint: Path) -> Iterator[Link]:
    """A worker that has computed the long prompt."""
    section = EngineSection(deterministic="on", kv_cache_bytes=64 * 16 * 2 * 2 * 2 * 8 * 4)
    engine = LocalEngine(tiny_checkpoint, dtype="float32", section=section, max_model_len=512)
    serve(engine, long_request())
    with lending(engine) as made:
        yield made


def bytes_in_pool(link: Link, name: BlockHash) -> list[int]:
    store = link.engine.engine.kv_store
    (block,) = store.pool.find([name])
    return list(store.cache.read_block(block).view(torch.uint8).flatten().tolist())


def data_of(tiers: KvTiers, name: bytes) -> Tensor:
    held = tiers.read(name)
    assert held is not None
    return held.data


def test_all_blocks_come_with_the_bits_of_the_pool(link: Link) -> None:
    tiers, names = tiers_of(), names_of(long_request())
    fetch = link.fetch(tiers, message_of(names))
    assert fetch.is_whole
    assert (fetch.num_blocks, link.lender.asked) == (len(names), [BATCH_BLOCKS, 4])
    assert fetch.num_bytes == tiers.host.num_bytes
    for name in names:
        assert data_of(tiers, name).tolist() == bytes_in_pool(link, name)


def test_the_other_worker_keeps_its_blocks_as_the_ones_to_keep(link: Link) -> None:
    pool, names = link.engine.engine.pool, names_of(long_request())
    others = pool.allocate(pool.num_blocks - len(names))
    for number, block in enumerate(others):
        pool.store(block, number.to_bytes(32, "big"))
    pool.release(others)
    serve(link.engine, long_request())
    link.fetch(tiers_of(), message_of(names))
    assert link.lender.kept == [0, 0]
    pool.allocate(len(others) - 1)
    assert len(pool.find(names)) == len(names), "older ones are evicted first"


def test_the_next_turn_brings_its_new_blocks_only(link: Link) -> None:
    tiers, names = tiers_of(), names_of(long_request())
    link.fetch(tiers, message_of(names[:3]))
    link.lender.asked.clear()
    fetch = link.fetch(tiers, message_of(names[:9]))
    assert (fetch.num_blocks, link.lender.asked) == (6, [6])


def test_a_hole_in_the_middle_is_filled(link: Link) -> None:
    tiers, names = tiers_of(), names_of(long_request())
    link.fetch(tiers, message_of(names[:9]))
    tiers.forget(names[2:4])
    assert not CopyFetch(tiers, link.engine.engine.kv_store.cache, message_of(names[:9])).is_whole
    link.fetch(tiers, message_of(names[:9]))
    assert all(map(tiers.has, names[:9]))


def test_what_the_other_worker_lacks_is_left_out(link: Link) -> None:
    tiers, names = tiers_of(), names_of(long_request())
    fetch = link.fetch(tiers, message_of([*names[:5], bytes(32)]))
    assert not fetch.is_whole
    assert [tiers.has(name) for name in names[:6]] == [True] * 5 + [False]


def test_there_is_room_for_so_many(link: Link) -> None:
    names = names_of(long_request())
    block_bytes = len(bytes_in_pool(link, names[0]))
    tiers = tiers_of(7 * block_bytes + 1)
    fetch = link.fetch(tiers, message_of(names))
    assert not fetch.is_whole
    assert fetch.num_blocks == 7
    assert link.lender.asked == [BATCH_BLOCKS], "nothing more is asked for"
    assert [tiers.has(name) for name in names[:8]] == [True] * 7 + [False]


def test_copies_go_on_to_the_disk_and_come_back_from_there(link: Link, tmp_path: Path) -> None:
    names = names_of(long_request())
    tiers = with_disk(HostTier(LARGE), DiskTier(claim_folder(tmp_path, 0), LARGE))
    with closing(tiers):
        link.fetch(tiers, message_of(names[:5]))
        assert tiers.wait_written(TIMEOUT_S)
        tiers.host.forget(names[2:5])
        link.lender.asked.clear()
        fetch = link.fetch(tiers, message_of(names[:9]))
        assert fetch.is_whole
        assert (fetch.num_blocks, link.lender.asked) == (4, [4])
        for name in names[:9]:
            assert data_of(tiers, name).tolist() == bytes_in_pool(link, name)


def test_copies_of_adapters_stay_in_memory(link: Link, tmp_path: Path) -> None:
    names, disk = names_of(long_request()), DiskTier(claim_folder(tmp_path, 0), LARGE)
    tiers = with_disk(HostTier(LARGE), disk)
    with closing(tiers):
        link.fetch(tiers, message_of(names[:5], may_outlive=False))
        link.fetch(tiers, message_of(names[:2]))
        assert tiers.wait_written(TIMEOUT_S)
        assert [disk.has(name) for name in names[:3]] == [True, True, False]
        assert tiers.host.has(names[4])


def test_copies_belong_to_the_tenant(link: Link) -> None:
    tiers, names = tiers_of(), names_of(long_request())
    link.fetch(tiers, message_of(names[:3], tenant="a"))
    link.fetch(tiers, message_of(names[:5], tenant="b"))
    each = tiers.host.num_bytes // 5
    assert [tiers.host.bytes_of(tenant) for tenant in "ab"] == [3 * each, 2 * each]


def test_what_came_before_an_error_is_kept(link: Link) -> None:
    tiers, names, chunks = tiers_of(), names_of(long_request()), []

    def count(num_bytes: int) -> None:
        chunks.append(num_bytes)
        if len(chunks) > 6:
            raise TransferAbortedError("enough")

    with pytest.raises(TransferAbortedError):
        link.fetch(tiers, message_of(names), before_chunk=count)
    assert [tiers.has(name) for name in names[:7]] == [True] * 6 + [False]
    link.settle()
    assert link.fetch(tiers, message_of(names)).num_blocks == len(names) - 6


@pytest.fixture
def states(golden: Callable[[str], Golden]) -> Iterator[Link]:
    """A worker with a model of recurrent states, which has computed a prompt of four blocks."""
    engine = engine_of(golden("qwen3next-base").path)
    serve(engine, request_of())
    with lending(engine) as made:
        yield made


def test_the_last_state_comes_with_its_blocks(states: Link) -> None:
    tiers, names = tiers_of(), names_of(request_of())
    fetch = states.fetch(tiers, message_of(names))
    assert fetch.is_whole
    slots = states.engine.engine.kv_store.states
    assert slots is not None
    slot = slots.hold_extra(names[-1])
    assert slot is not None
    expected = states.engine.engine.kv_store.cache.read_state(slot)
    slots.release_extra(slot)
    found = data_of(tiers, state_key(names[-1]))
    assert found.tolist() == expected.view(torch.uint8).flatten().tolist()
    states.lender.asked.clear()
    assert states.fetch(tiers, message_of(names)).num_blocks == 0
    assert states.lender.asked == []


def test_blocks_behind_the_last_state_are_left_out(states: Link) -> None:
    tiers, names = tiers_of(), names_of(request_of())
    fetch = states.fetch(tiers, message_of([*names, bytes(32)]))
    assert not fetch.is_whole
    assert all(map(tiers.has, [*names, state_key(names[-1])]))


def test_without_a_state_nothing_comes(states: Link) -> None:
    forget_states(states.engine)
    tiers, names = tiers_of(), names_of(request_of())
    assert states.fetch(tiers, message_of(names)).num_blocks == 0
    assert tiers.host.num_bytes == 0


def test_a_state_that_was_not_asked_for_is_refused(states: Link) -> None:
    tiers, names = tiers_of(), names_of(request_of())

    class Liar(Source):
        def read(self, item: ProvidedItem) -> tuple[Tensor, ...]:
            place, data = super().read(item)
            return place + 9, data

    states.lender.__class__ = Liar
    with pytest.raises(ProtocolError, match="index 12 among 4 keys"):
        states.fetch(tiers, message_of(names))


def counts(copies: CopyReceiver) -> dict[str, int]:
    stats = copies.stats()
    found = {name: int(stats[f'session_copies_total{{outcome="{name}"}}']) for name in OUTCOMES}
    return {name: count for name, count in found.items() if count}


@contextmanager
def copying(link: Link, tiers: KvTiers, bytes_per_s: float = FAST) -> Iterator[CopyReceiver]:
    cache = link.engine.engine.kv_store.cache
    peers = {link.peer.name: link.peer}
    copies = CopyReceiver(tiers, cache, peers.get, lambda: None, bytes_per_s)
    copies.start()
    with closing(copies):
        yield copies


def wait_counts(copies: CopyReceiver, link: Link, expected: dict[str, int]) -> None:
    """Wait until this many copies have come to an end, while the other worker answers."""
    while counts(copies) != expected:
        assert sum(counts(copies).values()) <= sum(expected.values()), counts(copies)
        link.lender.serve_requests()


def test_copies_are_kept_one_after_the_other(link: Link) -> None:
    tiers, names = tiers_of(), names_of(long_request())
    with copying(link, tiers) as copies:
        copies.put(message_of(names[:4]))
        wait_counts(copies, link, {"whole": 1})
        copies.put(message_of(names[:6]))
        wait_counts(copies, link, {"whole": 2})
        copies.put(message_of([*names[:7], bytes(32)]))
        wait_counts(copies, link, {"whole": 2, "part": 1})
        stats = copies.stats()
    link.settle()
    assert stats["session_copy_blocks_total"] == 7
    assert stats['kv_migration_bytes_total{reason="copy"}'] == tiers.host.num_bytes
    assert stats['kv_migration_seconds_count{reason="copy"}'] == 3
    assert stats['kv_migration_failures_total{reason="copy"}'] == 0


def test_a_copy_that_is_here_is_wanted_for_longer(link: Link) -> None:
    clock = [0.0]
    tiers = KvTiers(HostTier(LARGE, max_kept=100, clock=lambda: clock[0]))
    names = names_of(long_request())
    with copying(link, tiers) as copies:
        copies.put(message_of(names[:4], cache_ttl_s=10.0))
        wait_counts(copies, link, {"whole": 1})
        link.lender.asked.clear()
        clock[0] = 9.0
        copies.put(message_of(names[:4], cache_ttl_s=10.0))
        wait_counts(copies, link, {"whole": 2})
    assert link.lender.asked == []
    clock[0] = 18.0
    other = TurnUse(names=[bytes(32)], num_prompt=1, hints=NO_HINTS)
    tiers.end(tiers.begin(other))
    assert tiers.host._order.num_kept == 4


@pytest.mark.parametrize("names_peer", [False, True], ids=["unknown", "gone"])
def test_a_worker_that_has_left_costs_its_copies_only(
    link: Link, tiny_checkpoint: Path, names_peer: bool
) -> None:
    tiers, names = tiers_of(), names_of(long_request())
    with lending(engine_of(tiny_checkpoint)) as gone:
        pass
    cache = link.engine.engine.kv_store.cache
    peers = {"attention-0": link.peer} | ({"attention-9": gone.peer} if names_peer else {})
    with closing(CopyReceiver(tiers, cache, peers.get, lambda: None, FAST)) as copies:
        copies.start()
        copies.put(message_of(names[:4], source="attention-9"))
        wait_counts(copies, link, {"failed": 1})
        copies.put(message_of(names[:4]))
        wait_counts(copies, link, {"failed": 1, "whole": 1})


def test_copies_come_at_a_limited_rate(link: Link) -> None:
    """At a byte a second a worker that ends is not held up by one."""
    tiers, names = tiers_of(), names_of(long_request())
    with copying(link, tiers, bytes_per_s=1.0) as copies:
        copies.put(message_of(names))
        while not link.lender.asked:
            link.lender.serve_requests()
        link.lender.serve_requests()
        assert counts(copies) == {}
    assert counts(copies) == {"skipped": 1}
    assert tiers.host.num_bytes == 0


def test_an_error_of_ours_ends_one_copy_only(
    link: Link, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiers, names = tiers_of(), names_of(long_request())
    with copying(link, tiers) as copies:
        with monkeypatch.context() as patched:
            patched.setattr(KvTiers, "begin", None)
            copies.put(message_of(names[:4]))
            wait_counts(copies, link, {"failed": 1})
        copies.put(message_of(names[:4]))
        wait_counts(copies, link, {"failed": 1, "whole": 1})
    assert "could not copy KV blocks of attention-0" in caplog.text


def test_peers_that_hang_up_are_named(link: Link) -> None:
    message = message_of(names_of(long_request()))
    fetch = CopyFetch(tiers_of(), link.engine.engine.kv_store.cache, message)
    with closing(PeerClient(link.peer, TIMEOUT_S)) as client:
        client.close()
        with pytest.raises(PeerLostError, match="attention-0"):
            fetch.run(client)
