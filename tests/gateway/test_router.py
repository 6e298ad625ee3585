"""Routing policies, on loads made by hand."""

from __future__ import annotations

from gateway.router import DECODE_TOKENS, MISSING_WEIGHT, RoutingPolicy, WorkerLoad, pick_worker

LOADS = [
    WorkerLoad(name="a", outstanding_tokens=5),
    WorkerLoad(name="b", outstanding_tokens=2),
    WorkerLoad(name="c", outstanding_tokens=2),
]


def _picks(policy: RoutingPolicy, turns: int) -> list[str]:
    picked = [pick_worker(LOADS, policy, turn) for turn in range(turns)]
    return [load.name for load in picked if load is not None]


def _kv(loads: list[WorkerLoad], prompt_tokens: int, **cached: int) -> str:
    picked = pick_worker(loads, RoutingPolicy.KV, 0, prompt_tokens, cached)
    assert picked is not None
    return picked.name


def test_the_least_loaded_workers_take_turns() -> None:
    assert _picks(RoutingPolicy.LEAST_LOADED, 4) == ["b", "c", "b", "c"]


def test_round_robin_ignores_load() -> None:
    assert _picks(RoutingPolicy.ROUND_ROBIN, 4) == ["a", "b", "c", "a"]


def test_nobody_is_picked_from_nobody() -> None:
    assert all(pick_worker([], policy) is None for policy in RoutingPolicy)


def test_equals_take_turns_by_kv_too() -> None:
    assert _picks(RoutingPolicy.KV, 4) == ["a", "b", "c", "a"]


def test_a_cached_prefix_is_worth_waiting_for_up_to_its_price() -> None:
    price = int(500 * MISSING_WEIGHT)
    busy = [WorkerLoad(name="a"), WorkerLoad(name="b", queued_tokens=price - 1)]
    assert _kv(busy, 600, b=500) == "b"
    busy[1].queued_tokens = price + 1
    assert _kv(busy, 600, b=500) == "a"


def test_decoding_sequences_count() -> None:
    loads = [WorkerLoad(name="a", num_decoding=2), WorkerLoad(name="b", num_decoding=1)]
    assert _kv(loads, 100) == "b"
    assert _kv(loads, 100, a=DECODE_TOKENS) == "a"
