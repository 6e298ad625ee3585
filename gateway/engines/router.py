"""Routing policies, which pick the attention worker of a request. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gateway.engines.kv_index import KvIndex


class RoutingPolicy(Enum):
    KV = "kv"
    """Pick the worker that will have computed the prompt first, given its cached prefixes."""
    LEAST_LOADED = "least-loaded"
    """Pick the worker whose requests may still need the fewest prompt and output tokens."""
    ROUND_ROBIN = "round-robin"
    """Pick the workers in turn."""


MISSING_WEIGHT = 1.25
"""Cost of a prompt token that the worker computes for a new request, relative to a token for which
the request only waits. Above 1, as computing also delays all later requests and stores one more
copy of the KV block in the caches. On the Mooncake trace (``benchmarks/simulated/routing.py``) the
mean time to the first token is flat from 1 to 3; larger values make bursts with a common prefix
wait longer.
"""
DECODE_TOKENS = 64
"""Delay that each decoding sequence of a worker adds to a new prompt at the worker, in units of the
time to compute one prompt token."""
SESSION_TOKENS = 64
"""Preference, in prompt tokens, for the worker that served the last request of a session. This
worker caches more of the session than the full blocks of the new prompt."""
FETCH_TOKENS = 32
"""Fixed cost of fetching KV blocks from another worker, in units of the time to compute one prompt
token."""


@dataclass(kw_only=True, slots=True)
class WorkerLoad:
    """Load that the requests of this gateway cause at one worker."""

    name: str
    outstanding_tokens: int = 0
    """Number of tokens (prompt and output) that requests at the worker may still need."""
    queued_tokens: float = 0
    """Number of tokens to compute for this gateway's requests that do not decode yet."""
    num_decoding: int = 0
    """Number of this gateway's sequences that decode at the worker."""
    fetch_cost: float = math.inf
    """Time to fetch the KV of one token from another worker, divided by the time to compute one
    prompt token; infinite if the worker fetches none."""
    free_tokens: int = 0
    """Number of tokens that fit in the worker's free KV blocks, by its last message."""


@dataclass(frozen=True, slots=True)
class KvPeer:
    """Worker with the longest cached prefix of a prompt, from which another worker can fetch it."""

    name: str
    tokens: int
    """Number of leading prompt tokens that can be fetched from the worker."""


@dataclass(frozen=True, slots=True)
class Route:
    """Worker chosen for a request, with the number of prompt tokens that it need not compute."""

    load: WorkerLoad
    cached_tokens: int = 0
    """Number of prompt tokens that the worker need not compute, including fetched tokens."""
    peer: str = ""
    """Worker from which the chosen worker fetches KV blocks; empty if it fetches none."""


def pick_worker(
    loads: Sequence[WorkerLoad],
    policy: RoutingPolicy,
    num_routed: int = 0,
    prompt_tokens: int = 0,
    cached_tokens: Mapping[str, int] | None = None,
    peer: KvPeer | None = None,
    session_worker: str = "",
) -> Route:
    """Pick the worker of the next request.

    Args:
        loads: the workers that can take requests, at least one, in a fixed order.
        policy: routing policy.
        num_routed: number of requests routed so far; used for round-robin and ties.
        prompt_tokens: length of the request's prompt.
        cached_tokens: number of cached prompt tokens by worker; 0 for missing workers.
        peer: worker from which another worker can fetch a prefix of the prompt; None if none.
        session_worker: worker that served the last request of the session; empty if none.

    The ``kv`` policy minimizes a cost in prompt tokens: the tokens to wait for plus the tokens to
    compute. A worker fetches while it computes other prompts, so only the longer of both delays the
    request. The cost of the fetch is still added, since it uses links and memory.

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
        _prefer_session(session_worker, loads, costs)
        if peer is not None:
            fetches = _fetch_costs(loads, waits, missing, prompt_tokens - peer.tokens)
            _prefer_session(session_worker, loads, fetches)
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
    session_worker: str = "",
) -> Route:
    """Pick a request's worker by the ``kv`` policy, with the cached prefixes that ``index`` lists.

    ``hashes`` are the short hashes of the prompt's full KV blocks of ``block_size`` tokens.
    """
    matches = index.matches(hashes)
    cached = {worker: count * block_size for worker, count in matches.items()}
    peer = None
    if any(load.fetch_cost < math.inf for load in loads):
        holder, count = index.best_holder(hashes, matches)
        peer = KvPeer(holder, count * block_size) if count else None
    return pick_worker(
        loads, RoutingPolicy.KV, num_routed, prompt_tokens, cached, peer, session_worker
    )


def _prefer_session(session_worker: str, loads: Sequence[WorkerLoad], costs: list[float]) -> None:
    if session_worker:
        for place, load in enumerate(loads):
            if load.name == session_worker:
                costs[place] -= SESSION_TOKENS


def _fetch_costs(
    loads: Sequence[WorkerLoad], waits: Sequence[float], missing: Sequence[int], rest: int
) -> list[float]:
    """Return each worker's cost if it fetches all missing tokens except the last ``rest`` tokens.

    The cost is infinite for a worker that lacks at most ``rest`` tokens.
    """
    costs = []
    for load, wait, lacks in zip(loads, waits, missing, strict=True):
        took = FETCH_TOKENS + (lacks - rest) * load.fetch_cost
        costs.append(max(wait, took) + took + MISSING_WEIGHT * rest if lacks > rest else math.inf)
    return costs


def _route(load: WorkerLoad, known: Mapping[str, int]) -> Route:
    return Route(load, known.get(load.name, 0))


def _best(loads: Sequence[WorkerLoad], costs: Sequence[float], num_routed: int) -> WorkerLoad:
    """Return the worker with the lowest cost; workers with equal costs alternate."""
    least = min(costs)
    if costs.count(least) == 1:
        return loads[costs.index(least)]
    best = [load for load, own in zip(loads, costs, strict=True) if own == least]
    return best[num_routed % len(best)]
