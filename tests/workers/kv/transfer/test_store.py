"""Blocks that leave one engine and come into another: held while they move, the same bits there."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from benchmarks.harness.engine_stream import TIMEOUT_S
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from tests.harness.tiers import quick_values
from tests.reference.exact import exact
from tests.reference.goldens import Golden
from workers.engine.engine import Engine
from workers.kv.transfer.block_provider import KvBlockProvider, ProvidedItem
from workers.kv.transfer.fetch_cost import FORGET_S, UNMEASURED_COST, FetchCost
from workers.kv.transfer.offered_blocks import KEEP_S, OfferedBlocks
from workers.kv.transfer.store import Fetch, ProvidedState, StateFetch
from workers.requests.block_hash import block_hashes, state_key
from workers.requests.inspection import InspectionParams
from workers.requests.request import Request, SamplingParams, TokenOutput

pytestmark = pytest.mark.heavy

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, logprobs=2, ignore_eos=True)
PROMPT = tuple(3 + i % 50 for i in range(75))
NUM_BLOCKS = 4
"""Full blocks of the prompt of 16 tokens, one token at least left to compute."""
VARIANTS = (
    "olmoe-base",
    "dots1-groups",
    "jetmoe-tied",
    "qwen3moe-base",
    "gptoss-base",
    "glm4lite-official-like",
    "qwen3next-base",
)
"""A golden for each form of attention."""


def request_of(name: str = "r", **more: object) -> Request:
    return replace(Request(request_id=name, prompt=PROMPT, params=PARAMS), **more)


def engine_of(path: Path, dtype: str = "float32", num_blocks: int | None = None) -> LocalEngine:
    """A worker's engine; ``num_blocks`` of KV of the tiny model."""
    size = None if num_blocks is None else num_blocks * 16 * 2 * 2 * 2 * 8 * 4
    section = EngineSection(deterministic="on", kv_cache_bytes=size)
    return LocalEngine(path, dtype=dtype, section=section, max_model_len=128)


def serve(engine: LocalEngine, request: Request) -> list[TokenOutput]:
    outputs = engine.run([request])[request.request_id, 0]
    engine.engine.check_integrity()
    return outputs


def begin(engine: Engine, request: Request) -> Fetch | None:
    """Begin to fetch what the engine does not have of a request's prompt."""
    hashes = engine.kv_store.usable(request, block_hashes(request, 16, None))
    return engine.begin_fetch(hashes, engine.pool.find(hashes))


def copy(source: LocalEngine, target: LocalEngine, request: Request) -> int:
    """As two workers would; returns how many blocks were copied."""
    lender, taker = source.engine.kv_store, target.engine.kv_store
    fetch = begin(target.engine, request)
    assert fetch is not None
    if fetch.state is not None:
        copy_state(source, target, fetch, fetch.state)
    blocks = lender.acquire(fetch.wanted)
    for place, block in enumerate(blocks):
        taker.cache.write_block(fetch.blocks[place], lender.cache.read_block(block))
    fetch.num_filled = len(blocks)
    for engine in (source, target):
        engine.engine.check_integrity()
    taker.end(fetch)
    if blocks:
        lender.release(blocks, len(blocks))
    for engine in (source, target):
        engine.engine.check_integrity()
        assert engine.engine.pool.num_free == engine.engine.pool.num_blocks
    return len(blocks)


def copy_state(source: LocalEngine, target: LocalEngine, fetch: Fetch, state: StateFetch) -> None:
    """The last state of the prefix that the source has."""
    lender = source.engine.kv_store
    lent = lender.acquire_state([state_key(h) for h in fetch.hashes[state.num_known :]])
    if lent is not None:
        place, data = KvBlockProvider(lender, lambda: None).read(lent)
        target.engine.kv_store.cache.write_state(state.slot, data)
        state.num_before = state.num_known + int(place) + 1
        source.engine.check_integrity()
        lender.release_state(lent, is_kept=True)


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Path) -> LocalEngine:
    """An engine that has computed the prompt."""
    engine = engine_of(tiny_checkpoint)
    serve(engine, request_of())
    return engine


@pytest.mark.parametrize(("variant", "dtype"), quick_values(VARIANTS, ["float32", "bfloat16"]))
def test_copied_blocks_give_the_bits_that_computing_gives(
    golden: Callable[[str], Golden], variant: str, dtype: str
) -> None:
    path = golden(variant).path
    one, other = (engine_of(path, dtype) for _ in range(2))
    expected = exact(serve(one, request_of()))
    assert copy(one, other, request_of()) == NUM_BLOCKS
    outputs = serve(other, request_of())
    assert outputs[0].num_cached_tokens == NUM_BLOCKS * 16
    assert exact(outputs) == expected


def test_blocks_without_their_state_are_not_fetched(golden: Callable[[str], Golden]) -> None:
    path = golden("qwen3next-base").path
    one, other = engine_of(path), engine_of(path)
    expected = exact(serve(one, request_of()))
    forget_states(one)
    assert copy(one, other, request_of()) == 0
    outputs = serve(other, request_of())
    assert outputs[0].num_cached_tokens == 0
    assert exact(outputs) == expected
    again = serve(other, request_of("again"))
    assert again[0].num_cached_tokens == NUM_BLOCKS * 16
    assert exact(again) == expected


def test_a_state_is_fetched_alone_where_its_blocks_are_here(
    golden: Callable[[str], Golden],
) -> None:
    path = golden("qwen3next-base").path
    one, other = engine_of(path), engine_of(path)
    expected = [exact(serve(engine, request_of())) for engine in (one, other)]
    forget_states(other)
    assert copy(one, other, request_of()) == 0
    outputs = serve(other, request_of("again"))
    assert outputs[0].num_cached_tokens == NUM_BLOCKS * 16
    assert exact(outputs) == expected[0] == expected[1]


def test_blocks_are_fetched_up_to_the_last_state_of_the_peer(
    golden: Callable[[str], Golden],
) -> None:
    path = golden("qwen3next-base").path
    one, other = engine_of(path), engine_of(path)
    serve(one, replace(request_of("short"), prompt=PROMPT[:40]))  # its state is behind 2 blocks
    serve(one, request_of())
    forget_states(one, first=2)
    assert copy(one, other, request_of()) == 2
    assert serve(other, request_of())[0].num_cached_tokens == 32


def test_blocks_are_fetched_up_to_a_state_that_is_here(golden: Callable[[str], Golden]) -> None:
    path = golden("qwen3next-base").path
    one, other = engine_of(path), engine_of(path)
    for engine in (one, other):
        serve(engine, request_of())
    forget_states(one)
    hashes = block_hashes(request_of(), 16, None)
    pool = other.engine.pool
    pool.forget(pool.find(hashes)[1:])
    assert copy(one, other, request_of()) == NUM_BLOCKS - 1
    assert serve(other, request_of("again"))[0].num_cached_tokens == NUM_BLOCKS * 16
    assert begin(other.engine, request_of()) is None, "nothing is missing"


def forget_states(engine: LocalEngine, first: int = 0) -> None:
    """Those behind the blocks of the prompt from the first of these on."""
    states = engine.engine.states
    assert states is not None
    states.forget(block_hashes(request_of(), 16, None)[first:])


def test_a_fetch_knows_what_has_become_of_use() -> None:
    hashes = tuple(bytes([i]) * 32 for i in range(6))
    state = StateFetch(slot=0, num_known=1)
    fetch = Fetch(hashes=hashes, found=[0, 1], num_usable=1, blocks=[2, 3, 4, 5], state=state)
    assert (fetch.wanted, fetch.num_gained) == ((), 0)
    assert fetch.lacks(hashes[1])
    assert not fetch.lacks(hashes[0])
    state.num_before = 5
    assert fetch.wanted == hashes[2:5]
    assert fetch.num_gained == 0
    fetch.num_filled = 3
    assert fetch.num_gained == 4
    state.num_before = 2
    assert fetch.wanted == ()
    assert fetch.num_gained == 1


def test_states_are_fetched_into_slots_that_are_left(golden: Callable[[str], Golden]) -> None:
    path = golden("qwen3next-base").path
    section = EngineSection(deterministic="on", max_num_seqs=1, num_cached_states=0)
    engine = LocalEngine(path, section=section, max_model_len=128).engine
    fetch = begin(engine, request_of())
    assert fetch is not None
    assert begin(engine, request_of(cache_salt="x")) is None, "one sequence needs the other two"
    engine.kv_store.end(fetch)
    engine.check_integrity()
    assert begin(engine, request_of(cache_salt="x")) is not None


def test_only_what_is_missing_is_asked_for(source: LocalEngine, tiny_checkpoint: Path) -> None:
    target = engine_of(tiny_checkpoint)
    serve(target, replace(request_of(), prompt=PROMPT[:40]))
    assert copy(source, target, request_of()) == NUM_BLOCKS - 2
    assert serve(target, request_of())[0].num_cached_tokens == NUM_BLOCKS * 16
    assert begin(target.engine, request_of()) is None


def test_tenants_share_nothing(source: LocalEngine, tiny_checkpoint: Path) -> None:
    target = engine_of(tiny_checkpoint)
    assert copy(source, target, request_of(cache_salt="tenant")) == 0
    assert serve(target, request_of())[0].num_cached_tokens == 0


def test_what_must_be_computed_is_not_fetched(tiny_checkpoint: Path) -> None:
    engine = engine_of(tiny_checkpoint).engine
    scored = request_of(params=replace(PARAMS, prompt_logprobs=1))
    assert begin(engine, scored) is None
    assert begin(engine, request_of(inspection=InspectionParams(logits=(0,)))) is None
    assert begin(engine, replace(request_of(), prompt=PROMPT[:16])) is None


def test_what_came_of_a_prefix_is_kept_and_the_rest_is_blank(tiny_checkpoint: Path) -> None:
    engine = engine_of(tiny_checkpoint, num_blocks=8).engine
    fetch = begin(engine, request_of())
    assert fetch is not None
    assert engine.pool.num_free == 8 - NUM_BLOCKS
    assert begin(engine, request_of(cache_salt="x")) is not None
    assert begin(engine, request_of(cache_salt="y")) is None  # none are left
    fetch.num_filled = 2
    engine.kv_store.end(fetch)
    engine.check_integrity()
    again = begin(engine, request_of())
    assert again is not None
    assert (len(again.found), len(again.wanted)) == (2, 2)


def test_found_blocks_that_are_forgotten_during_a_fetch_are_zeroed(tiny_checkpoint: Path) -> None:
    engine = engine_of(tiny_checkpoint, num_blocks=8)
    serve(engine, request_of())
    longer = replace(request_of("longer"), prompt=(*PROMPT, *PROMPT[:25]))
    fetch = begin(engine.engine, longer)
    assert fetch is not None
    assert len(fetch.found) == NUM_BLOCKS
    cache = engine.engine.kv_store.cache
    nan = torch.full(cache.block_shape, math.nan)
    for block in fetch.found:  # as if the sequence that computed them had failed meanwhile
        cache.write_block(block, nan)
    engine.engine.pool.forget(fetch.found)
    engine.engine.kv_store.end(fetch)
    engine.engine.check_integrity()
    assert all(layer.isfinite().all() for layer in cache.layers)


def test_lent_blocks_stay_until_they_are_returned(tiny_checkpoint: Path) -> None:
    engine = engine_of(tiny_checkpoint, num_blocks=8)
    serve(engine, request_of(params=replace(PARAMS, max_tokens=1)))
    hashes = _wanted(engine_of(tiny_checkpoint)).hashes
    lent = engine.engine.kv_store.acquire(hashes)
    assert len(lent) == NUM_BLOCKS
    data = [engine.engine.kv_store.cache.read_block(block) for block in lent]
    other = replace(request_of("other"), prompt=PROMPT[40:90])
    serve(engine, other)  # takes all others
    for block, kept in zip(lent, data, strict=True):
        assert engine.engine.kv_store.cache.read_block(block).equal(kept)
    engine.engine.kv_store.release(lent, len(lent))
    serve(engine, replace(request_of("third"), prompt=PROMPT[::-1]))
    assert len(engine.engine.kv_store.acquire(hashes)) < 2  # a peer has them: they went first
    assert serve(engine, other)[0].num_cached_tokens == 32


def _wanted(engine: LocalEngine) -> Fetch:
    fetch = begin(engine.engine, request_of())
    assert fetch is not None
    return fetch


def test_threads_borrow_between_two_turns(source: LocalEngine, tiny_checkpoint: Path) -> None:
    asked = threading.Event()
    lender = KvBlockProvider(source.engine.kv_store, asked.set, timeout_s=TIMEOUT_S)
    hashes = _wanted(engine_of(tiny_checkpoint)).hashes
    found: list[list[ProvidedItem]] = []
    thread = threading.Thread(target=lambda: found.append(lender.acquire(hashes)), daemon=True)
    thread.start()
    assert asked.wait(TIMEOUT_S)
    lender.serve_requests()
    thread.join(TIMEOUT_S)
    assert len(found[0]) == NUM_BLOCKS
    assert source.engine.pool.num_free == source.engine.pool.num_blocks - NUM_BLOCKS
    assert lender.read(found[0][0])[0].shape == source.engine.kv_store.cache.block_shape
    lender.release(found[0], 0)
    lender.serve_requests()
    source.engine.check_integrity()
    assert source.engine.pool.num_free == source.engine.pool.num_blocks


def test_a_borrower_without_an_answer_in_time_gets_nothing(source: LocalEngine) -> None:
    lender = KvBlockProvider(source.engine.kv_store, lambda: None, timeout_s=0.01)
    assert lender.acquire([bytes(32)]) == []
    lender.serve_requests()
    source.engine.check_integrity()


def test_a_state_is_lent_after_the_last_key_that_is_known(golden: Callable[[str], Golden]) -> None:
    engine = engine_of(golden("qwen3next-base").path)
    serve(engine, request_of())
    states = engine.engine.states
    assert states is not None
    hashes = [*block_hashes(request_of(), 16, None), bytes(32)]
    assert states.num_known(hashes) == NUM_BLOCKS
    lender = KvBlockProvider(engine.engine.kv_store, lambda: None, timeout_s=TIMEOUT_S)
    found: list[list[ProvidedItem]] = []
    keys = [*map(state_key, hashes[1:])]
    thread = threading.Thread(target=lambda: found.append(lender.acquire(keys)), daemon=True)
    thread.start()
    while not found:
        lender.serve_requests()
    ((lent,),) = found
    assert isinstance(lent, ProvidedState)
    assert lent.place == NUM_BLOCKS - 2
    engine.engine.check_integrity()
    assert lent.slot in states.extra
    lender.release([lent], 1)
    lender.serve_requests()
    assert not states.extra
    engine.engine.check_integrity()


def test_the_cost_is_measured_and_a_slow_link_is_tried_again() -> None:
    cost = FetchCost()
    assert cost.ratio(0.0) == UNMEASURED_COST
    cost.observe_prefill(1000, 1.0)
    assert cost.ratio(0.0) == UNMEASURED_COST
    cost.observe_fetch(8000, 1.0, now_s=100.0)
    assert cost.ratio(100.0) == pytest.approx(0.125)
    for _ in range(30):
        cost.observe_fetch(0, 2.0, now_s=101.0)  # it fails
    assert cost.ratio(101.0) > 1
    assert cost.ratio(102.0 + FORGET_S) == UNMEASURED_COST
    cost.observe_fetch(4000, 1.0, now_s=102.0 + FORGET_S)
    assert cost.ratio(102.0 + FORGET_S) == pytest.approx(0.25)


def test_offered_blocks_are_lent_at_once_and_held_until_the_last_copy(
    source: LocalEngine, tiny_checkpoint: Path
) -> None:
    """No turn of the engine thread is needed to lend them, only to release them."""
    lender, now = KvBlockProvider(source.engine.kv_store, lambda: None, timeout_s=0.0), [0.0]
    lender.offers = OfferedBlocks(source.engine.kv_store, lambda: now[0])
    hashes, pool = _wanted(engine_of(tiny_checkpoint)).hashes, source.engine.pool
    lender.offers.put("b", [hashes[:1]])
    lender.offers.put("a", [hashes[:1]])
    lender.offers.put("a", [hashes[:1], hashes])
    first, second = lender.acquire(hashes[1:]), lender.acquire(hashes)
    assert lender.acquire([*hashes, bytes(32)]) == [], "the pool may have more of them"
    assert (len(first), len(second)) == (NUM_BLOCKS - 1, NUM_BLOCKS)
    assert lender.read(first[0])[0].shape == source.engine.kv_store.cache.block_shape
    lender.release(second, 0)
    lender.offers.keep_only(set())
    third = lender.acquire(hashes[:1])
    assert len(third) == 1, "the request has left, but its blocks are needed"
    now[0] = KEEP_S + 0.1
    lender.offers.keep_only(set())
    assert lender.acquire(hashes) == []
    assert pool.num_free == pool.num_blocks - NUM_BLOCKS
    lender.release(first, 1)
    lender.release(third, 0)
    lender.offers.keep_only(set())
    source.engine.check_integrity()
    assert pool.num_free == pool.num_blocks


def test_an_offer_ends_when_its_last_block_is_copied(source: LocalEngine) -> None:
    lender = KvBlockProvider(source.engine.kv_store, lambda: None, timeout_s=0.0)
    hashes, pool = block_hashes(request_of(), 16, None), source.engine.pool
    lender.offers.put("a", [hashes])
    lent = lender.acquire(hashes)
    lender.release(lent, len(lent))
    lender.offers.keep_only({"a"})
    assert pool.num_free == pool.num_blocks - NUM_BLOCKS
    lender.offers.keep_only(set())
    source.engine.check_integrity()
    assert pool.num_free == pool.num_blocks
