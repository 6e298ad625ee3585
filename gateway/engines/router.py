"""Picks the attention worker of a request. Pure: loads in, a choice out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gateway.engines.kv_index import KvIndex


class RoutingPolicy(Enum):
    KV = "kv"
    """The worker that computes the prompt soonest, given its cached prefixes."""
    LEAST_LOADED = "least-loaded"
    """Fewest outstanding tokens."""
    ROUND_ROBIN = "round-robin"
    """One worker after the other."""


MISSING_WEIGHT = 1.25
"""Cost of a prompt token to compute, in tokens of waiting. Above 1, since it also delays all later
requests, and leaves one more copy of its block in the caches. On the Mooncake trace
(``benchmarks/routing.py``) the mean time to the first token is flat from 1 to 3; larger values make
bursts with a common prefix wait longer.
"""
DECODE_TOKENS = 64
"""Cost of a decoding sequence for a prompt, in prompt tokens that are computed before it."""
FETCH_TOKENS = 32
"""Fixed cost of fetching blocks from a peer, in prompt tokens."""


@dataclass(kw_only=True, slots=True)
class WorkerLoad:
    """The work that this gateway has given to one worker."""

    name: str
    outstanding_tokens: int = 0
    """Outstanding prompt and output tokens."""
    queued_tokens: float = 0
    """Prompt tokens that it must still compute."""
    num_decoding: int = 0
    """Sequences that decode."""
    fetch_cost: float = math.inf
    """Prompt tokens that it computes in the time in which it fetches one from a peer."""


@dataclass(frozen=True, slots=True)
class KvPeer:
    """The worker with the longest cached part of a prompt."""

    name: str
    tokens: int
    """Leading prompt tokens that can be fetched from it."""


@dataclass(frozen=True, slots=True)
class Route:
    """The route of a request."""

    load: WorkerLoad
    cached_tokens: int = 0
    """Prompt tokens that it need not compute, including fetched ones."""
    peer: str = ""
    """The worker from which it fetches some of them."""


def pick_worker(
    loads: Sequence[WorkerLoad],
    policy: RoutingPolicy,
    num_routed: int = 0,
    prompt_tokens: int = 0,
    cached_tokens: Mapping[str, int] | None = None,
    peer: KvPeer | None = None,
) -> Route | None:
    """The worker for the next request; None if there is none.

    Args:
        loads: the workers that can take requests, in a fixed order.
        policy: how to choose.
        num_routed: number of requests routed so far; decides round-robin and equal loads.
        prompt_tokens: length of the request's prompt.
        cached_tokens: by worker, the cached prompt tokens (workers without any may be left out).
        peer: from which another worker could fetch a part of the prompt.

    The cost that ``kv`` minimises is in prompt tokens: those to wait for, and those to compute. A
    worker may fetch from the peer while it computes others, so that only the longer of both delays
    the request; but the time of fetching is added as well, since it keeps links and memory busy.

    Example: loads a=5, b=2, c=2 and num_routed 3 give c with least-loaded (b and c alternate) and
    a with round-robin (3 mod 3 = 0).
    """
    if not loads:
        return None
    known = cached_tokens or {}
    if policy is RoutingPolicy.ROUND_ROBIN:
        return _route(loads[num_routed % len(loads)], known)
    if policy is RoutingPolicy.LEAST_LOADED:
        costs: list[float] = [load.outstanding_tokens for load in loads]
    else:
        get = known.get
        waits = [x.queued_tokens + DECODE_TOKENS * x.num_decoding for x in loads]
        costs = [
            wait + MISSING_WEIGHT * (prompt_tokens - get(x.name, 0))
            for x, wait in zip(loads, waits, strict=True)
        ]
        if peer is not None:
            return _best_with_fetches(loads, waits, costs, num_routed, prompt_tokens, known, peer)
    return _route(_best(loads, costs, num_routed), known)


def route_by_kv(
    index: KvIndex,
    hashes: Sequence[bytes],
    loads: Sequence[WorkerLoad],
    num_routed: int,
    prompt_tokens: int,
    block_size: int,
) -> Route | None:
    """``pick_worker`` by ``kv``, for a prompt whose full blocks have these (short) hashes."""
    matches = index.matches(hashes)
    cached = {worker: count * block_size for worker, count in matches.items()}
    peer = None
    if any(load.fetch_cost < math.inf for load in loads):
        holder, count = index.best_holder(hashes, matches)
        peer = KvPeer(holder, count * block_size) if count else None
    return pick_worker(loads, RoutingPolicy.KV, num_routed, prompt_tokens, cached, peer)


def _best_with_fetches(
    loads: Sequence[WorkerLoad],
    waits: Sequence[float],
    costs: Sequence[float],
    num_routed: int,
    prompt_tokens: int,
    known: Mapping[str, int],
    peer: KvPeer,
) -> Route:
    """The result without fetches, or that of a worker which is better off with one."""
    missing = MISSING_WEIGHT * (prompt_tokens - peer.tokens)
    least = min(costs)
    best: list[WorkerLoad] = []
    for load, wait in zip(loads, waits, strict=True):
        own = known.get(load.name, 0)
        took = FETCH_TOKENS + (peer.tokens - own) * load.fetch_cost
        cost = max(wait, took) + took + missing
        if own < peer.tokens and (cost < least or (best and cost == least)):
            best = [*best, load] if cost == least else [load]
            least = cost
    if best:
        return Route(best[num_routed % len(best)], peer.tokens, peer.name)
    return _route(_best(loads, costs, num_routed), known)


def _route(load: WorkerLoad, known: Mapping[str, int]) -> Route:
    return Route(load, known.get(load.name, 0))


def _best(loads: Sequence[WorkerLoad], costs: Sequence[float], num_routed: int) -> WorkerLoad:
    """The one with the least cost; equal ones alternate."""
    least = min(costs)
    if costs.count(least) == 1:
        return loads[costs.index(least)]
    best = [load for load, own in zip(loads, costs, strict=True) if own == least]
    return best[num_routed % len(best)]
