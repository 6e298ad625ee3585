"""Shares of tenants in seats, and what goes before a new request."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from gateway.calls.tenant_queues import CallDemand, TenantQueues


def demand(
    tenant: str, num_requests: int = 1, *, weight: float = 1.0, priority: int = 0, tokens: int = 10
) -> CallDemand:
    """A call whose requests have ``tokens`` tokens each."""
    return CallDemand(
        num_requests=num_requests,
        num_tokens=tokens * num_requests,
        tenant=tenant,
        weight=weight,
        priority=priority,
    )


def queues_of(*demands: CallDemand) -> TenantQueues:
    queues = TenantQueues()
    for one in demands:
        queues.add(one, 1)
    return queues


def test_what_a_tenant_leaves_is_for_the_others() -> None:
    queues = queues_of(demand("a", 8), demand("b", 100), demand("c", 100))
    assert queues.share_seats(64) == {"a": 8, "b": 28, "c": 28}
    queues = queues_of(demand("a", 100, weight=3.0), demand("b", 100))
    assert queues.share_seats(64) == {"a": 48, "b": 16}


def test_a_tenant_may_have_almost_no_weight() -> None:
    queues = queues_of(demand("a", 8, weight=1e12), demand("b", 10, weight=1e-5))
    assert queues.share_seats(64) == {"a": 8, "b": 10}
    assert queues.share_seats(10) == pytest.approx({"a": 8, "b": 2})


def test_a_tenant_alone_waits_for_what_does_not_run() -> None:
    assert queues_of(demand("a", 10)).tokens_ahead(4, "a", 0) == pytest.approx(60)
    assert queues_of(demand("a", 3)).tokens_ahead(4, "a", 0) == 0
    assert queues_of(demand("a", 10)).tokens_ahead(4, "b", 0) == 0


def test_another_tenant_gets_as_much_meanwhile_by_weight() -> None:
    queues = queues_of(demand("a", 5), demand("b", 100))
    assert queues.tokens_ahead(4, "a", 0) == pytest.approx(30 + 30)
    queues = queues_of(demand("a", 6, weight=2.0), demand("b", 100))
    assert queues.tokens_ahead(6, "a", 0) == pytest.approx(20 + 10)


def test_the_newest_call_sets_the_weight() -> None:
    queues = queues_of(demand("a", 50), demand("b", 50), demand("a", weight=3.0))
    assert queues.share_seats(40) == {"a": 30, "b": 10}


def test_lower_priority_values_run_and_go_first() -> None:
    later = demand("a", 10, priority=5)
    queues = queues_of(demand("a", 3), later)
    assert queues.tokens_ahead(4, "a", 0) == 0
    assert queues.tokens_ahead(4, "a", 5) == pytest.approx(90)
    queues.add(later, -1)
    assert queues.tokens_ahead(2, "a", 5) == pytest.approx(10)


def test_a_tenant_without_requests_is_gone() -> None:
    queues = queues_of(demand("a", 2), demand("b"))
    assert len(queues) == 2
    queues.add(demand("a", 2), -1)
    assert len(queues) == 1
    assert "a" not in queues
    assert "b" in queues
    assert (queues.total("a").num_seats, queues.total("b").num_seats) == (0, 1)


@pytest.mark.parametrize("seed", range(6))
def test_shares_and_waits_are_those_of_a_walk_over_all_tenants(seed: int) -> None:
    rng = random.Random(seed)
    weights = {f"t{i}": rng.choice([0.25, 1.0, 1.0, 3.0]) for i in range(rng.choice([2, 9, 60]))}
    queues, held = TenantQueues(), list[CallDemand]()
    for _ in range(400):
        if held and rng.random() < 0.45:
            queues.add(held.pop(rng.randrange(len(held))), -1)
        else:
            tenant = rng.choice(list(weights))
            held.append(
                demand(
                    tenant,
                    rng.randint(1, 4),
                    weight=weights[tenant],
                    priority=rng.choice([0, 0, 0, 1, -3, 7]),
                    tokens=rng.randint(1, 500),
                )
            )
            queues.add(held[-1], 1)
        capacity = rng.choice([0, 1, 5, 64, 1000])
        tenant, priority = rng.choice(list(weights)), rng.choice([-3, 0, 1, 9])
        assert queues.share_seats(capacity) == pytest.approx(walked_shares(held, capacity))
        expected = walked_tokens(held, capacity, tenant, priority)
        assert queues.tokens_ahead(capacity, tenant, priority) == pytest.approx(expected)


def walked_shares(held: Sequence[CallDemand], capacity: float) -> dict[str, float]:
    """The seats of each tenant, those with the fewest for their weight first."""
    wanted: Counter[str] = Counter()
    for one in held:
        wanted[one.tenant] += one.num_seats
    weight_of = {one.tenant: one.weight for one in held}
    seats, left, weights = {}, capacity, sum(weight_of.values())
    for tenant in sorted(wanted, key=lambda t: wanted[t] / weight_of[t]):
        seats[tenant] = min(wanted[tenant], left * weight_of[tenant] / weights)
        left -= seats[tenant]
        weights -= weight_of[tenant]
    return seats


def walked_tokens(held: Sequence[CallDemand], capacity: float, tenant: str, priority: int) -> float:
    """``TenantQueues.tokens_ahead`` of every tenant in turn."""
    seats = walked_shares(held, capacity)
    weight_of = {one.tenant: one.weight for one in held}
    if tenant not in seats:
        return 0.0
    first = walked_waiting([h for h in held if h.tenant == tenant], seats[tenant], priority)
    others = sum(
        min(
            walked_waiting([h for h in held if h.tenant == other], seats[other]),
            first * weight_of[other] / weight_of[tenant],
        )
        for other in seats
        if other != tenant
    )
    return first + others


def walked_waiting(
    held: Sequence[CallDemand], num_running: float, priority: float = float("inf")
) -> float:
    """The waiting tokens of one tenant."""
    waiting = 0.0
    for value in sorted({one.priority for one in held}):
        if value > priority:
            break
        own = [one for one in held if one.priority == value]
        num_seats = sum(one.num_seats for one in own)
        runs = min(num_running, num_seats)
        num_running -= runs
        waiting += sum(one.num_tokens for one in own) * (1 - runs / num_seats)
    return waiting
