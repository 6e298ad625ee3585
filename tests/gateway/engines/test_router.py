"""Routing policies, on loads made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from benchmarks.engine.kv_index import Router
from gateway.engines.kv_index import KvIndex
from gateway.engines.router import (
    DECODE_TOKENS,
    FETCH_TOKENS,
    MISSING_WEIGHT,
    SESSION_TOKENS,
    KvPeer,
    Route,
    RoutingPolicy,
    WorkerLoad,
    pick_worker,
    route_by_kv,
)
from workers.requests.block_hash import KvEvents

LOADS = [
    WorkerLoad(name="a", outstanding_tokens=5),
    WorkerLoad(name="b", outstanding_tokens=2),
    WorkerLoad(name="c", outstanding_tokens=2),
]


def _picks(policy: RoutingPolicy, count: int) -> list[str]:
    return [pick_worker(LOADS, policy, number).load.name for number in range(count)]


def _kv(loads: list[WorkerLoad], prompt_tokens: int, **cached: int) -> str:
    return pick_worker(loads, RoutingPolicy.KV, 0, prompt_tokens, cached).load.name


def test_the_least_loaded_workers_alternate() -> None:
    assert _picks(RoutingPolicy.LEAST_LOADED, 4) == ["b", "c", "b", "c"]


def test_round_robin_ignores_load() -> None:
    assert _picks(RoutingPolicy.ROUND_ROBIN, 4) == ["a", "b", "c", "a"]


def test_equals_alternate_by_kv_too() -> None:
    assert _picks(RoutingPolicy.KV, 4) == ["a", "b", "c", "a"]


def test_a_cached_prefix_is_worth_waiting_for_up_to_its_price() -> None:
    price = int(500 * MISSING_WEIGHT)
    busy = [WorkerLoad(name="a"), WorkerLoad(name="b", queued_tokens=price - 1)]
    assert _kv(busy, 600, b=500) == "b"
    busy[1].queued_tokens = price + 1
    assert _kv(busy, 600, b=500) == "a"


def test_a_session_stays_where_it_was_if_that_costs_little() -> None:
    loads = [WorkerLoad(name=name) for name in "abc"]

    def pick(session_worker: str, **cached: int) -> str:
        found = (
            pick_worker(loads, RoutingPolicy.KV, n, 600, cached, session_worker=session_worker)
            for n in range(3)
        )
        return "".join(route.load.name for route in found)

    assert pick("") == "abc"
    assert pick("b") == "bbb"
    assert pick("gone") == "abc"
    assert pick("b", c=500) == "ccc", "it has lost the blocks, and another one has them"
    loads[1].queued_tokens = SESSION_TOKENS - 1
    assert pick("b") == "bbb"
    loads[1].queued_tokens = SESSION_TOKENS + 1
    assert "b" not in pick("b")


def test_a_session_that_is_fetched_comes_home_too() -> None:
    loads = [WorkerLoad(name=name, fetch_cost=0.1) for name in "abc"]
    loads[0].queued_tokens = 5000
    peer = KvPeer("a", 900)
    found = [pick_worker(loads, RoutingPolicy.KV, n, 1000, {"a": 900}, peer, "c") for n in (0, 1)]
    assert [(route.load.name, route.peer) for route in found] == [("c", "a"), ("c", "a")]


def test_decoding_sequences_count() -> None:
    loads = [WorkerLoad(name="a", num_decoding=2), WorkerLoad(name="b", num_decoding=1)]
    assert _kv(loads, 100) == "b"
    assert _kv(loads, 100, a=DECODE_TOKENS) == "a"


def _fetching(loads: list[WorkerLoad], **cached: int) -> Route:
    peer = KvPeer("a", cached["a"])
    return pick_worker(loads, RoutingPolicy.KV, 0, 600, cached, peer)


def test_an_idle_worker_fetches_from_a_busy_one_where_that_costs_little() -> None:
    busy, idle = WorkerLoad(name="a", queued_tokens=400), WorkerLoad(name="b")
    assert _fetching([busy, idle], a=500) == Route(busy, 500)  # it cannot
    idle.fetch_cost = 0.1
    assert _fetching([busy, idle], a=500) == Route(idle, 500, "a")
    assert _fetching([busy, idle], a=500, b=100) == Route(idle, 500, "a")
    assert _fetching([busy, idle], a=500, b=500) == Route(idle, 500)
    idle.fetch_cost = 0.5
    assert _fetching([busy, idle], a=500) == Route(busy, 500)
    busy.queued_tokens = 100_000
    assert _fetching([busy, idle], a=500) == Route(idle, 500, "a")
    idle.fetch_cost = 2.0  # slower than computing
    assert _fetching([busy, idle], a=500) == Route(idle, 0)


def test_few_tokens_are_not_worth_a_fetch() -> None:
    busy = WorkerLoad(name="a", queued_tokens=100_000)
    idle = WorkerLoad(name="b", fetch_cost=0.0)
    few = int(2 * FETCH_TOKENS / MISSING_WEIGHT)
    assert _fetching([busy, idle], a=few) == Route(idle, 0)
    assert _fetching([busy, idle], a=few + 1) == Route(idle, few + 1, "a")


def _fetch_repeatedly(loads: list[WorkerLoad], count: int) -> list[str]:
    peer, found = KvPeer("a", 500), []
    for number in range(count):
        picked = pick_worker(loads, RoutingPolicy.KV, number, 600, {"a": 500}, peer)
        assert (picked.cached_tokens, picked.peer) == (500, "a")
        found.append(picked.load.name)
    return found


def test_workers_that_fetch_equally_well_alternate() -> None:
    busy = WorkerLoad(name="a", queued_tokens=100_000)
    idle = [WorkerLoad(name=name, fetch_cost=0.1) for name in "bcd"]
    assert _fetch_repeatedly([busy, *idle], 4) == ["b", "c", "d", "b"]
    idle[1].fetch_cost = 0.05
    assert _fetch_repeatedly([busy, *idle], 2) == ["c", "c"]
    idle[1].fetch_cost = 0.2
    assert _fetch_repeatedly([busy, *idle], 2) == ["b", "d"]


def test_a_fetch_that_gains_nothing_is_not_made() -> None:
    """Waiting costs as much as the fetch, whose two halves cost ``FETCH_TOKENS`` each."""
    busy = WorkerLoad(name="a", queued_tokens=2 * FETCH_TOKENS)
    idle = WorkerLoad(name="b", fetch_cost=0.0)
    assert _fetching([busy, idle], a=500) == Route(busy, 500)
    busy.queued_tokens += 1
    assert _fetching([busy, idle], a=500) == Route(idle, 500, "a")


BLOCKS = [bytes([i] * 8) for i in range(6)]


@pytest.mark.parametrize(
    ("fetch_cost", "reported", "expected", "choice"),
    [
        (0.1, 5, 5, ("b", 500, "a")),
        (math.inf, 5, 5, ("a", 500, "")),
        (0.1, 4, 5, ("b", 400, "a")),  # the fifth is not there yet
        (0.1, 0, 5, ("a", 500, "")),
        (0.1, 0, 0, ("b", 0, "")),
    ],
)
def test_a_prompt_is_routed_by_the_blocks_that_workers_report(
    fetch_cost: float, reported: int, expected: int, choice: tuple[str, int, str]
) -> None:
    index = KvIndex()
    index.apply("a", KvEvents(number=1, is_whole=True, stored=tuple(BLOCKS[:reported])))
    index.expect("a", BLOCKS[:expected])
    loads = [
        WorkerLoad(name="a", queued_tokens=400),
        WorkerLoad(name="b", fetch_cost=fetch_cost),
    ]
    found = route_by_kv(index, BLOCKS, loads, 0, 650, 100)
    assert (found.load.name, found.cached_tokens, found.peer) == choice


@pytest.mark.parametrize(
    ("own", "queued_tokens", "fetches"),
    [(0, 163.9, False), (0, 164.1, True), (100, 143.9, False), (100, 144.1, True)],
)
def test_a_fetch_costs_what_the_worker_lacks(own: int, queued_tokens: float, fetches: bool) -> None:
    """32 and a tenth of the missing blocks' tokens, while it waits and once more."""
    busy = WorkerLoad(name="a", queued_tokens=queued_tokens)
    idle = WorkerLoad(name="b", fetch_cost=0.1)
    cached = {"a": 500} | ({"b": own} if own else {})
    expected = Route(idle, 500, "a") if fetches else Route(busy, 500)
    assert _fetching([busy, idle], **cached) == expected


def test_a_worker_with_more_than_the_peer_does_not_fetch() -> None:
    loads = [WorkerLoad(name="a", queued_tokens=100_000), WorkerLoad(name="b")]
    assert _fetching(loads, a=500, b=501) == Route(loads[1], 501)


@pytest.mark.parametrize("num_workers", [2, 64])
def test_a_request_that_comes_alone_is_looked_up_once(
    monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    router, num_lookups = Router(num_workers), 0
    matches, names = router.kv.matches, [number.to_bytes(8, "big") for number in range(20)]
    router.kv.apply("attention-01", KvEvents(number=0, is_whole=True, stored=tuple(names)))

    def counted(hashes: Sequence[bytes]) -> dict[str, int]:
        nonlocal num_lookups
        num_lookups += 1
        return matches(hashes)

    monkeypatch.setattr(router.kv, "matches", counted)
    assert [router.assign(i, names).worker for i in range(5)] == ["attention-01"] * 5
    assert num_lookups == 5
