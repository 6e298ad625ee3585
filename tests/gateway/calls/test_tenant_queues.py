"""Shares of tenants in places, and what goes before a new request."""

from __future__ import annotations

import pytest

from gateway.calls.tenant_queues import CallDemand, TenantQueue, share_seats, tokens_ahead


def queue(num_requests: int, weight: float = 1.0, priority: int = 0) -> TenantQueue:
    """Requests of ten tokens each."""
    made = TenantQueue(weight)
    made.add(
        CallDemand(num_requests=num_requests, num_tokens=10 * num_requests, priority=priority), 1
    )
    return made


def test_what_a_tenant_leaves_is_for_the_others() -> None:
    places = share_seats({"a": queue(8), "b": queue(100), "c": queue(100)}, 64)
    assert places == {"a": 8, "b": 28, "c": 28}
    assert share_seats({"a": queue(100, 3.0), "b": queue(100)}, 64) == {"a": 48, "b": 16}


def test_a_tenant_may_have_almost_no_weight() -> None:
    queues = {"a": queue(8, 1e12), "b": queue(10, 1e-5)}  # the sum of the weights is 1e12
    assert share_seats(queues, 64) == {"a": 8, "b": 10}


def test_a_tenant_alone_waits_for_what_does_not_run() -> None:
    assert tokens_ahead({"a": queue(10)}, 4, "a", 0) == pytest.approx(60)
    assert tokens_ahead({"a": queue(3)}, 4, "a", 0) == 0
    assert tokens_ahead({"a": queue(10)}, 4, "b", 0) == 0


def test_another_tenant_gets_as_much_meanwhile_by_weight() -> None:
    queues = {"a": queue(5), "b": queue(100)}
    assert tokens_ahead(queues, 4, "a", 0) == pytest.approx(30 + 30)
    queues = {"a": queue(6, 2.0), "b": queue(100)}
    assert tokens_ahead(queues, 6, "a", 0) == pytest.approx(20 + 10)


def test_lower_priority_values_run_and_go_first() -> None:
    own = queue(3)
    ask = CallDemand(num_requests=10, num_tokens=100, priority=5)
    own.add(ask, 1)
    assert tokens_ahead({"a": own}, 4, "a", 0) == 0
    assert tokens_ahead({"a": own}, 4, "a", 5) == pytest.approx(90)
    own.add(ask, -1)
    assert own.by_priority.keys() == {0}
