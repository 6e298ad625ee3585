"""Which attention worker gets a request. Pure: loads in, a name out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class RoutingPolicy(Enum):
    """How a worker is chosen."""

    KV = "kv"
    """Where the prompt is computed soonest, with regard to what is cached there."""
    LEAST_LOADED = "least-loaded"
    """Fewest tokens outstanding."""
    ROUND_ROBIN = "round-robin"
    """In turn."""


MISSING_WEIGHT = 2.0
"""Worth of a prompt token that must be computed, in tokens of waiting. Above 1, since it also holds
up all who come later, and leaves one more copy of its block in the caches. On the Mooncake trace
(``benchmarks/routing.py``) the mean time to the first token is flat from 1.5 to 3."""
DECODE_TOKENS = 64
"""What a decoding sequence costs a prompt, in prompt tokens that are computed before it."""


@dataclass(kw_only=True, slots=True)
class WorkerLoad:
    """What this gateway has given one worker to do."""

    name: str
    """The worker."""
    outstanding_tokens: int = 0
    """Prompt and output tokens that are still waited for."""
    queued_tokens: float = 0
    """Prompt tokens that it has yet to compute."""
    num_decoding: int = 0
    """Sequences that decode."""


def pick_worker(
    loads: Sequence[WorkerLoad],
    policy: RoutingPolicy,
    turn: int = 0,
    prompt_tokens: int = 0,
    cached_tokens: Mapping[str, int] | None = None,
) -> WorkerLoad | None:
    """The worker for the next request; None when there is none.

    Args:
        loads: the workers that can take requests, in an order that stays.
        policy: how to choose.
        turn: number of requests routed so far; decides round-robin and equal loads.
        prompt_tokens: length of the request's prompt.
        cached_tokens: by worker, how many of them are cached there (none where not named).

    What ``kv`` minimises is in prompt tokens: those to wait for, and those to compute.

    Example: loads a=5, b=2, c=2 and turn 3 give c with least-loaded (b and c take turns) and
    a with round-robin (3 mod 3 = 0).
    """
    if not loads:
        return None
    if policy is RoutingPolicy.ROUND_ROBIN:
        return loads[turn % len(loads)]
    if policy is RoutingPolicy.LEAST_LOADED:
        costs: list[float] = [load.outstanding_tokens for load in loads]
    else:
        known = cached_tokens or {}
        costs = [
            x.queued_tokens
            + DECODE_TOKENS * x.num_decoding
            + MISSING_WEIGHT * (prompt_tokens - known.get(x.name, 0))
            for x in loads
        ]
    least = min(costs)
    best = [load for load, own in zip(loads, costs, strict=True) if own == least]
    return best[turn % len(best)]
