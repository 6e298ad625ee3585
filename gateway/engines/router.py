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
(``benchmarks/simulated/routing.py``) the mean time to the first token is flat from 1 to 3; larger
values make bursts with a common prefix wait longer.
"""
DECODE_TOKENS = 64
"""Cost of a decoding sequence for a prompt, in prompt tokens that are computed before it."""
HOME_TOKENS = 64
"""Preference for the worker that served the last request of a session, in prompt tokens: it has
more of the session than full blocks of its prompt, and the next request will look there as well."""
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
    free_tokens: int = 0
    """Tokens for which it has room, as of its last message."""


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
    home: str = "",
) -> Route:
    """The worker for the next request.

    Args:
        loads: the workers that can take requests, one at least, in a fixed order.
        policy: how to choose.
        num_routed: number of requests routed so far; decides round-robin and equal loads.
        prompt_tokens: length of the request's prompt.
        cached_tokens: by worker, the cached prompt tokens (workers without any may be left out).
        peer: from which another worker could fetch a part of the prompt.
        home: the worker that served the last request of the session; empty: none.

    The cost that ``kv`` minimises is in prompt tokens: those to wait for, and those to compute. A
    worker may fetch from the peer while it computes others, so that only the longer of both delays
    the request; but the time of fetching is added as well, since it keeps links and memory busy.

    Example: loads a=5, b=2, c=2 and num_routed 3 give c with least-loaded (b and c alternate) and
    a with round-robin (3 mod 3 = 0).
    """
    known = cached_tokens or {}
    if policy is RoutingPolicy.ROUND_ROBIN:
        return _route(loads[num_routed % len(loads)], known)
    if policy is RoutingPolicy.LEAST_LOADED:
        costs: list[float] = [load.outstanding_tokens for load in loads]
    else:
        get = known.get
        waits = [x.queued_tokens + DECODE_TOKENS * x.num_decoding for x in loads]
        missing = [prompt_tokens - get(x.name, 0) for x in loads]
        costs = [w + MISSING_WEIGHT * m for w, m in zip(waits, missing, strict=True)]
        _prefer(home, loads, costs)
        if peer is not None:
            fetches = _fetch_costs(loads, waits, missing, prompt_tokens - peer.tokens)
            _prefer(home, loads, fetches)
            if min(fetches) < min(costs):
                return Route(_best(loads, fetches, num_routed), peer.tokens, peer.name)
    return _route(_best(loads, costs, num_routed), known)


def route_by_kv(
    index: KvIndex,
    hashes: Sequence[bytes],
    loads: Sequence[WorkerLoad],
    num_routed: int,
    prompt_tokens: int,
    block_size: int,
    home: str = "",
) -> Route:
    """``pick_worker`` by ``kv``, for a prompt whose full blocks have these (short) hashes."""
    matches = index.matches(hashes)
    cached = {worker: count * block_size for worker, count in matches.items()}
    peer = None
    if any(load.fetch_cost < math.inf for load in loads):
        holder, count = index.best_holder(hashes, matches)
        peer = KvPeer(holder, count * block_size) if count else None
    return pick_worker(loads, RoutingPolicy.KV, num_routed, prompt_tokens, cached, peer, home)


def _prefer(home: str, loads: Sequence[WorkerLoad], costs: list[float]) -> None:
    if home:
        for place, load in enumerate(loads):
            if load.name == home:
                costs[place] -= HOME_TOKENS


def _fetch_costs(
    loads: Sequence[WorkerLoad], waits: Sequence[float], missing: Sequence[int], rest: int
) -> list[float]:
    """Costs with a fetch of all tokens but ``rest``; infinite where no more are missing."""
    costs = []
    for load, wait, lacks in zip(loads, waits, missing, strict=True):
        took = FETCH_TOKENS + (lacks - rest) * load.fetch_cost
        costs.append(max(wait, took) + took + MISSING_WEIGHT * rest if lacks > rest else math.inf)
    return costs


def _route(load: WorkerLoad, known: Mapping[str, int]) -> Route:
    return Route(load, known.get(load.name, 0))


def _best(loads: Sequence[WorkerLoad], costs: Sequence[float], num_routed: int) -> WorkerLoad:
    """The one with the least cost; equal ones alternate."""
    least = min(costs)
    if costs.count(least) == 1:
        return loads[costs.index(least)]
    best = [load for load, own in zip(loads, costs, strict=True) if own == least]
    return best[num_routed % len(best)]
