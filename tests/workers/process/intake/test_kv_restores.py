"""Requests wait for KV blocks of lower tiers, where that is cheaper than computing them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.harness.engine_stream import TIMEOUT_S
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.config.kv_cache import KvCacheDType
from cluster.config.kv_tiers import KvTiersSection
from tests.reference.exact import exact
from tests.reference.goldens import Golden
from tests.workers.kv.transfer.test_store import (
    NUM_BLOCKS,
    PROMPT,
    VARIANTS,
    request_of,
    serve,
)
from tests.workers.process.intake.test_kv_fetches import add
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.fetch_cost import FetchCost
from workers.process.intake import kv_restores
from workers.process.intake.kv_restores import KvRestores
from workers.process.intake.lower_tiers import LowerTiers, open_tiers
from workers.requests.block_hash import block_hashes
from workers.requests.request import Request

pytestmark = pytest.mark.heavy

MIB = 2**20
ALONE = EngineSection(deterministic="on", enable_prefix_caching=False)
"""Every prompt is computed from its first token."""


class Tiered:
    """An engine with lower tiers, and what goes into them and comes out."""

    def __init__(
        self,
        path: Path,
        folder: Path | None = None,
        dtype: str = "float32",
        kv_cache_dtype: KvCacheDType = "auto",
        host_bytes: int = MIB,
    ) -> None:
        engine = EngineSection(deterministic="on", kv_cache_dtype=kv_cache_dtype)
        self.local = LocalEngine(path, dtype=dtype, section=engine, max_model_len=128)
        self.engine = self.local.engine
        section = KvTiersSection(kv_host_bytes=host_bytes)
        if folder is not None:
            section = KvTiersSection(
                kv_host_bytes=host_bytes, kv_disk_bytes=2 * MIB, kv_disk_dir=str(folder)
            )
        tiers = open_tiers(section, self.engine.cache, 0.5, 0)
        assert tiers is not None
        tiers.use(f"{path} {dtype} {self.engine.cache.dtype}")
        assert tiers.wait_written(TIMEOUT_S)
        self.tiers: KvTiers = tiers
        self.woken = threading.Event()
        self.seen: set[bytes] = set()
        """Blocks that it may have."""
        self.late_s = 0.0
        """What the clock of the restores is ahead of time."""
        self.cost = FetchCost()
        self.copies = self.engine.start_tier_copies(tiers, self.woken.set)
        self.restores = KvRestores(
            self.engine, tiers, self.cost, self.woken.set, lambda: time.monotonic() + self.late_s
        )

    def close(self) -> None:
        LowerTiers(self.tiers, self.copies, self.restores).close()

    def serve(self, request: Request) -> tuple[object, int]:
        """What a client sees, and its cached tokens; what it leaves is in all tiers then."""
        outputs = serve(self.local, request)
        tokens = [token for output in outputs for token in output.token_ids]
        whole = replace(request, prompt=(*request.prompt, *tokens))
        self.seen.update(block_hashes(whole, 16, None))
        self.settle()
        cached = outputs[0].num_cached_tokens
        assert cached is not None
        return exact(outputs), cached

    def settle(self) -> None:
        while not self.copies.is_idle:
            assert self.woken.wait(TIMEOUT_S)
            self.woken.clear()
            self.copies.advance()
            self.engine.check_integrity()
        assert self.tiers.wait_written(TIMEOUT_S)

    def restore(self, request: Request) -> bool:
        """Whether a request waited for blocks; it does no more."""
        command = add(request)
        if not self.restores.put(command):
            return False
        while not (taken := self.restores.take()):
            assert self.woken.wait(TIMEOUT_S)
            self.woken.clear()
        assert taken == [command]
        self.engine.check_integrity()
        return True

    def evict(self) -> None:
        """The pool gives up all blocks and states."""
        pool = self.engine.pool
        pool.release(pool.allocate(pool.num_free))
        if self.engine.states is not None:
            self.engine.states.forget(self.seen)

    def serve_again(self, name: str = "again", **more: object) -> tuple[object, int]:
        """The prompt once more, from the tiers as far as they have it."""
        self.evict()
        request = request_of(name, **more)
        self.restore(request)
        return self.serve(request)


@pytest.fixture
def tiered(tiny_checkpoint: Path) -> Iterator[Tiered]:
    found = Tiered(tiny_checkpoint)
    yield found
    found.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_restored_blocks_give_the_bits_that_computing_gives(
    golden: Callable[[str], Golden], variant: str, tier: str, tmp_path: Path
) -> None:
    path = golden(variant).path
    first = Tiered(path, tmp_path if tier == "disk" else None)
    expected, cached = first.serve(request_of())
    assert cached == 0
    if tier == "disk":
        first.close()
        first = Tiered(path, tmp_path)
    assert first.serve_again() == (expected, NUM_BLOCKS * 16)
    assert first.restores.stats()[f'kv_restore_tokens_total{{tier="{tier}"}}'] == NUM_BLOCKS * 16
    first.close()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_of_a_cache_is_restored(
    tiny_checkpoint: Path, tmp_path: Path, dtype: str, kv_cache_dtype: KvCacheDType
) -> None:
    first = Tiered(tiny_checkpoint, tmp_path, dtype, kv_cache_dtype)
    expected, _ = first.serve(request_of())
    assert first.serve_again() == (expected, NUM_BLOCKS * 16)
    first.close()
    other = Tiered(tiny_checkpoint, tmp_path, dtype, kv_cache_dtype)
    assert other.serve_again() == (expected, NUM_BLOCKS * 16)
    other.close()


def test_an_output_is_kept_for_the_next_turn(tiered: Tiered) -> None:
    params = replace(request_of().params, max_tokens=40)
    outputs = serve(tiered.local, request_of(params=params))
    tiered.settle()
    answer = [token for output in outputs for token in output.token_ids]
    prompt = (*PROMPT, *answer)
    _, cached = tiered.serve_again(prompt=prompt)  # what was computed of it, but the last block
    assert cached == (len(prompt) - 1) // 16 * 16


def test_tenants_restore_nothing_of_each_other(tiered: Tiered) -> None:
    expected, _ = tiered.serve(request_of())
    tiered.evict()
    assert not tiered.restore(request_of("other", cache_salt="tenant"))
    assert tiered.serve(request_of("other", cache_salt="tenant")) == (expected, 0)


def test_what_nobody_will_use_again_is_not_copied(tiered: Tiered) -> None:
    tiered.serve(request_of(cache_ttl_s=0.0))
    assert tiered.tiers.host.num_bytes == 0
    tiered.serve(request_of("again"))
    assert tiered.tiers.host.num_bytes > 0


def test_only_missing_blocks_are_restored(tiered: Tiered) -> None:
    expected, _ = tiered.serve(request_of())
    hashes = block_hashes(request_of(), 16, None)
    pool = tiered.engine.pool
    pool.forget(pool.find(hashes)[1:])
    assert tiered.restore(request_of("again"))
    assert tiered.serve(request_of("again")) == (expected, NUM_BLOCKS * 16)
    tokens = tiered.restores.stats()['kv_restore_tokens_total{tier="host"}']
    assert tokens == (NUM_BLOCKS - 1) * 16


def test_a_file_that_is_damaged_costs_no_more_than_its_blocks(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    first = Tiered(tiny_checkpoint, tmp_path)
    expected, _ = first.serve(request_of())
    first.close()
    name = block_hashes(request_of(), 16, None)[2].hex()
    (path,) = tmp_path.rglob(f"{name}.kv")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    other = Tiered(tiny_checkpoint, tmp_path)
    assert other.serve_again() == (expected, 2 * 16)
    assert other.tiers.stats()['kv_tier_broken_total{tier="disk"}'] == 1
    assert other.serve_again("third") == (expected, NUM_BLOCKS * 16)
    other.close()


def test_nothing_is_restored_that_is_cheaper_to_compute(tiered: Tiered) -> None:
    tiered.serve(request_of())
    tiered.evict()
    tiered.cost.observe_prefill(1000, 1.0)
    now_s = time.monotonic()
    tiered.restores.cost.observe("host", tiered.engine.cache.block_bytes, 0.1, now_s)
    assert not tiered.restore(request_of("again"))
    tiered.late_s = 60.0  # measured too long ago: the tier is tried again
    assert tiered.restore(request_of("again"))


def test_a_cheaper_peer_goes_first(tiered: Tiered) -> None:
    tiered.serve(request_of())
    tiered.evict()
    now_s, block = time.monotonic(), tiered.engine.cache.block_bytes
    tiered.cost.observe_prefill(1000, 1.0)
    tiered.cost.observe_fetch(1000, 0.1, now_s)
    tiered.restores.cost.observe("host", block, 0.008, now_s)  # half as fast as computing
    assert not tiered.restore(request_of("again", kv_peer="attention-1"))
    assert tiered.restore(request_of("again"))


def test_requests_with_one_prefix_share_a_restore(tiered: Tiered) -> None:
    tiered.serve(request_of())
    tiered.evict()
    commands = [add(request_of(name)) for name in "abc"]
    assert all(tiered.restores.put(command) for command in commands)
    tiered.restores.drop("b")
    assert tiered.restores.names == ["a", "c"]
    found: list[object] = []
    while len(found) < 2:
        assert tiered.woken.wait(TIMEOUT_S)
        tiered.woken.clear()
        found += tiered.restores.take()
    assert found == [commands[0], commands[2]]
    assert [command.has_joined for command in commands] == [False, True, True]
    assert tiered.restores.names == []


def test_a_restore_that_is_late_holds_nobody_up(
    tiered: Tiered, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiered.serve(request_of())
    tiered.evict()
    may_read = threading.Event()
    read = tiered.tiers.read

    def slow(name: bytes) -> object:
        assert may_read.wait(TIMEOUT_S)
        return read(name)

    monkeypatch.setattr(tiered.tiers, "read", slow)
    command = add(request_of("again"))
    assert tiered.restores.put(command)
    tiered.late_s = 3600.0
    assert tiered.restores.wait_s(60.0) == 0.0
    assert tiered.restores.take() == [command]
    assert not tiered.restores.put(add(request_of("more")))
    may_read.set()
    while tiered.restores._jobs:
        assert tiered.woken.wait(TIMEOUT_S)
        tiered.woken.clear()
        assert tiered.restores.take() == []
    tiered.engine.check_integrity()
    assert tiered.engine.pool.num_free == tiered.engine.pool.num_blocks


def test_a_disk_that_hangs_holds_no_blocks_for_what_waits_behind_it(
    tiered: Tiered, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = (request_of(f"r{n}", prompt=(3 + n, *PROMPT[1:])) for n in range(6))
    for request in (first, *others):
        tiered.serve(request)
    tiered.evict()
    may_read, read = threading.Event(), tiered.tiers.read

    def hang(name: bytes) -> object:
        assert may_read.wait(TIMEOUT_S)
        return read(name)

    monkeypatch.setattr(tiered.tiers, "read", hang)
    assert all(tiered.restores.put(add(request)) for request in (first, *others))
    tiered.late_s = 3600.0
    assert len(tiered.restores.take()) == 6
    assert len(tiered.restores._jobs) == kv_restores.MAX_RESTORING, "the rest has no thread"
    tiered.engine.check_integrity()
    assert not tiered.restores.put(add(others[-1])), "it would wait for the same disk"
    may_read.set()
    while tiered.restores._jobs:
        assert tiered.woken.wait(TIMEOUT_S)
        tiered.woken.clear()
        assert tiered.restores.take() == []
    assert tiered.engine.pool.num_free == tiered.engine.pool.num_blocks
    assert tiered.restores.put(add(others[-1]))


def test_only_so_many_prefixes_wait(tiered: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_restores, "MAX_JOBS", 2)
    requests = [request_of(f"r{seed}", prompt=(3 + seed, *PROMPT[1:])) for seed in range(3)]
    for request in requests:
        tiered.serve(request)
    tiered.evict()
    assert [tiered.restores.put(add(r)) for r in requests] == [True, True, False]


@pytest.mark.parametrize("variant", ["olmoe-base", "qwen3next-base"])
def test_random_sessions_have_the_bits_of_an_engine_without_tiers(
    golden: Callable[[str], Golden], variant: str, tmp_path: Path
) -> None:
    path, draw = golden(variant).path, random.Random(5)
    plain = LocalEngine(path, section=ALONE, dtype="float32", max_model_len=128)
    block_bytes = plain.engine.cache.block_bytes + plain.engine.cache.state_bytes
    tiered = Tiered(path, tmp_path, host_bytes=12 * block_bytes)
    prompts = {name: tuple(draw.choices(range(3, 96), k=20)) for name in "abcd"}
    for number in range(30):
        name = draw.choice("abcd")
        request = request_of(f"{name}{number}", prompt=prompts[name], session=name)
        if draw.random() < 0.4:
            tiered.evict()
        tiered.restore(request)
        found, _ = tiered.serve(request)
        outputs = plain.run([request])[request.request_id, 0]
        assert found == exact(outputs)
        answer = [token for output in outputs for token in output.token_ids]
        more = draw.choices(range(3, 96), k=draw.randrange(1, 20))
        prompts[name] = (*prompts[name], *answer, *more)
        if len(prompts[name]) > 100:
            prompts[name] = prompts[name][: draw.randrange(20, 60)]
        for tier in tiered.tiers.tiers:
            tier.check_integrity()
    stats = tiered.restores.stats()
    assert all(stats[f'kv_restore_tokens_total{{tier="{t}"}}'] > 0 for t in ("host", "disk"))
    tiered.close()


def test_blocks_of_broken_numbers_are_forgotten(tiered: Tiered) -> None:
    tiered.serve(request_of())
    names = block_hashes(request_of(), 16, None)
    assert tiered.tiers.tiers_of(names) == ["host"] * NUM_BLOCKS
    tiered.tiers.forget(names[1:])
    assert tiered.tiers.tiers_of(names) == ["host"]
    tiered.tiers.host.check_integrity()
