"""Which attention worker gets a request. Pure: loads in, a name out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class RoutingPolicy(Enum):
    """How a worker is chosen."""

    LEAST_LOADED = "least-loaded"
    ROUND_ROBIN = "round-robin"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLoad:
    """What the router knows of one worker."""

    name: str
    """The worker."""
    outstanding_tokens: int
    """Prompt and output tokens that this gateway still waits for there."""


def pick_worker(
    loads: Sequence[WorkerLoad], policy: RoutingPolicy, turn: int = 0
) -> WorkerLoad | None:
    """The worker for the next request; None when there is none.

    Args:
        loads: the workers that can take requests, in any order.
        policy: how to choose.
        turn: number of requests routed so far; decides round-robin and equal loads.

    Example: loads a=5, b=2, c=2 and turn 3 give c with least-loaded (b and c take turns) and
    a with round-robin (3 mod 3 = 0).
    """
    ordered = sorted(loads, key=lambda load: load.name)
    if policy is RoutingPolicy.LEAST_LOADED and ordered:
        least = min(load.outstanding_tokens for load in ordered)
        ordered = [load for load in ordered if load.outstanding_tokens == least]
    return ordered[turn % len(ordered)] if ordered else None
