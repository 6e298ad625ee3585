"""Admitted requests of each tenant, and the work ahead of a new request. Pure.

The engines serve tenants in proportion to their weights, by tokens
(``workers.scheduling.fairness``); within a tenant, lower priority values run first. Admission
assumes the same order. Therefore a long queue of one tenant neither delays requests of other
tenants nor causes their refusal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workers.requests.request import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class CallDemand:
    """Resources that a call requests (sequences, tokens), with its tenant and priority."""

    num_requests: int = 1
    """Number of engine requests of the call, one per prompt."""
    num_choices: int = 1
    """Number of choices per request. Each choice is one sequence at the engines."""
    num_tokens: int = 1
    """Maximum number of prompt and output tokens of all requests of the call."""
    num_bytes: int = 0
    """Number of bytes of the call's prompt embeddings."""
    tenant: str = ""
    weight: float = 1.0
    """Weight of the tenant; engines serve tenants in proportion to their weights."""
    priority: int = 0
    """Priority of the call; lower values run first within a tenant."""

    @classmethod
    def of(cls, requests: Sequence[Request]) -> CallDemand:
        """Return the demand of a call from its engine requests, at least one."""
        first = requests[0]
        num_tokens = sum(len(one.prompt) + one.n * one.params.max_tokens for one in requests)
        return cls(
            num_requests=len(requests),
            num_choices=first.n,
            num_tokens=num_tokens,
            num_bytes=sum(len(e.data) for one in requests if (e := one.prompt_embeds) is not None),
            tenant=first.tenant,
            weight=first.weight,
            priority=first.priority,
        )

    @property
    def num_seats(self) -> int:
        """Number of sequences that the call has at the engines."""
        return self.num_requests * self.num_choices


@dataclass(slots=True)
class HeldDemand:
    """Sum of the demands of admitted calls that have not ended."""

    num_requests: int = 0
    num_seats: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def add(self, demand: CallDemand, sign: int) -> None:
        self.num_requests += sign * demand.num_requests
        self.num_seats += sign * demand.num_seats
        self.num_tokens += sign * demand.num_tokens
        self.num_bytes += sign * demand.num_bytes


@dataclass(slots=True)
class TenantQueue:
    """Demand of the running and waiting requests of one tenant, by priority."""

    weight: float = 1.0
    by_priority: dict[int, HeldDemand] = field(default_factory=dict)
    total: HeldDemand = field(default_factory=HeldDemand)
    """Demand of the tenant's requests of all priorities."""

    def add(self, demand: CallDemand, sign: int) -> None:
        """Add the demand of a call (``sign`` 1), or remove it (``sign`` -1)."""
        held = self.by_priority.setdefault(demand.priority, HeldDemand())
        held.add(demand, sign)
        self.total.add(demand, sign)
        if not held.num_requests:
            del self.by_priority[demand.priority]

    def waiting_tokens(self, num_running: float, priority: int | None = None) -> float:
        """Return the tokens of waiting requests, if ``num_running`` sequences of the tenant run.

        Only requests with a priority value up to ``priority`` count; None counts all.
        """
        waiting = 0.0
        for value in sorted(self.by_priority):
            if priority is not None and value > priority:
                break
            held = self.by_priority[value]
            runs = min(num_running, held.num_seats)
            num_running -= runs
            waiting += held.num_tokens * (1 - runs / held.num_seats)
        return waiting


def share_seats(queues: Mapping[str, TenantQueue], capacity: float) -> dict[str, float]:
    """Return the number of running sequences of each tenant, at most ``capacity`` in all.

    A tenant gets a share by weight, plus a part of the shares that other tenants do not use.

    Example: capacity 64, a has 8 sequences, b 100, c 100, equal weights: a runs 8, b 28, c 28.
    """
    seats: dict[str, float] = {}
    left, weights = capacity, sum(queue.weight for queue in queues.values())
    for name, queue in sorted(queues.items(), key=lambda i: i[1].total.num_seats / i[1].weight):
        all_weights = max(weights, queue.weight)  # rounding may have left weights too small
        seats[name] = min(float(queue.total.num_seats), left * queue.weight / all_weights)
        left -= seats[name]
        weights -= queue.weight
    return seats


def tokens_ahead(
    queues: Mapping[str, TenantQueue], capacity: float, tenant: str, priority: int
) -> float:
    """Return the number of waiting tokens that the engines serve before a new request of a tenant.

    These are N tokens of ``tenant``, with priority values up to ``priority``, and of each other
    tenant T at most N * (weight of T / own weight). ``capacity``: sequences that run at a time.
    """
    own = queues.get(tenant)
    if own is None:
        return 0.0
    seats = share_seats(queues, capacity)
    first = own.waiting_tokens(seats[tenant], priority)
    others = (
        min(queue.waiting_tokens(seats[name]), first * queue.weight / own.weight)
        for name, queue in queues.items()
        if name != tenant
    )
    return first + sum(others)
