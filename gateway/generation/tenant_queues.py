"""What a replica holds of each tenant, and what of it goes before a new request. Pure.

The engines let tenants take turns by tokens over their weight (``workers.requests.fairness``), and
within a tenant lower priority values go first. Admission follows the same order, so that the queue
of one tenant does not make the requests of another one wait, or be refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Held:
    """Requests, and the tokens that they may need together."""

    num_requests: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class TenantQueue:
    """One tenant's requests, running or waiting."""

    weight: float = 1.0
    by_priority: dict[int, Held] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        return sum(held.num_requests for held in self.by_priority.values())

    @property
    def num_tokens(self) -> int:
        return sum(held.num_tokens for held in self.by_priority.values())

    def add(self, priority: int, num_requests: int, num_tokens: int) -> None:
        """More of a priority; negative numbers: less."""
        held = self.by_priority.setdefault(priority, Held())
        held.num_requests += num_requests
        held.num_tokens += num_tokens
        if not held.num_requests:
            del self.by_priority[priority]

    def waiting_tokens(self, num_running: float, priority: int | None = None) -> float:
        """Tokens of those that wait while the first ``num_running`` run, up to a priority."""
        waiting = 0.0
        for value in sorted(self.by_priority):
            if priority is not None and value > priority:
                break
            held = self.by_priority[value]
            runs = min(num_running, held.num_requests)
            num_running -= runs
            waiting += held.num_tokens * (1 - runs / held.num_requests)
        return waiting


def share_places(queues: Mapping[str, TenantQueue], capacity: float) -> dict[str, float]:
    """Running requests of each tenant: equal shares by weight, what one leaves is for the others.

    Example: 64 places, a holds 8 requests, b 100 and c 100, weights 1: a 8, b 28, c 28.
    """
    places: dict[str, float] = {}
    left, weights = capacity, sum(queue.weight for queue in queues.values())
    for name, queue in sorted(queues.items(), key=lambda i: i[1].num_requests / i[1].weight):
        places[name] = min(float(queue.num_requests), left * queue.weight / weights)
        left -= places[name]
        weights -= queue.weight
    return places


def tokens_ahead(
    queues: Mapping[str, TenantQueue], capacity: float, tenant: str, priority: int
) -> float:
    """Waiting tokens that the engines serve before a new request of a tenant.

    Those of its own up to its priority; and of each other tenant as many meanwhile, by weight.
    """
    own = queues.get(tenant)
    if own is None:
        return 0.0
    places = share_places(queues, capacity)
    first = own.waiting_tokens(places[tenant], priority)
    others = (
        min(queue.waiting_tokens(places[name]), first * queue.weight / own.weight)
        for name, queue in queues.items()
        if name != tenant
    )
    return first + sum(others)
