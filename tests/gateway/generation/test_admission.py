"""Admission: bounds on requests, tokens and bytes, and retry times."""

from __future__ import annotations

import pytest

from cluster.core import errors
from gateway.generation.admission import Admission


def test_admission_bounds_requests_and_gives_places_back_once() -> None:
    admission = Admission(max_requests=2, max_tokens=100, capacity=8)
    first = admission.admit(1, 10, 0.0)
    second = admission.admit(1, 10, 0.0)
    with pytest.raises(errors.QueueFullError, match="at most 2") as caught:
        admission.admit(1, 10, 0.0)
    assert 1 <= caught.value.retry_after_s <= 60
    first.release(1.0)
    first.release(1.0)
    assert (admission.num_requests, admission.num_tokens) == (1, 10)
    second.release(2.0)
    assert (admission.num_requests, admission.num_tokens) == (0, 0)


def test_admission_bounds_bytes_of_embeddings() -> None:
    admission = Admission(max_requests=8, max_tokens=100, capacity=8, max_prompt_bytes=100)
    first = admission.admit(1, 1, 0.0, num_bytes=150)  # alone, however large
    admission.admit(1, 1, 0.0)
    with pytest.raises(errors.QueueFullError, match=r"150 bytes of embeddings, .* needs 10"):
        admission.admit(1, 1, 0.0, num_bytes=10)
    first.release(1.0)
    first.release(1.0)
    admission.admit(1, 1, 1.0, num_bytes=10)
    assert admission.num_bytes == 10


def test_admission_bounds_tokens_but_never_a_lone_call() -> None:
    admission = Admission(max_requests=8, max_tokens=100, capacity=8)
    admission.admit(1, 1000, 0.0)
    with pytest.raises(errors.QueueFullError, match="tokens"):
        admission.admit(1, 1, 0.0)


def test_the_retry_time_follows_the_drain() -> None:
    admission = Admission(max_requests=100, max_tokens=10**6, capacity=10)
    tickets = [admission.admit(1, 1, 0.0) for _ in range(100)]
    assert admission.queue_time_s() == 0.0
    for place, ticket in enumerate(tickets[:40], start=1):
        ticket.release(place / 2)  # two a second
    assert admission.num_waiting == 50
    assert admission.retry_after_s(20) == pytest.approx(10.0)
    assert admission.queue_time_s() == pytest.approx(25.0)


@pytest.mark.parametrize("capacity", [4, 16])
def test_the_retry_time_follows_the_drain_of_a_full_queue(capacity: int) -> None:
    """Whether or not the engines could run more than the queue holds."""
    admission = Admission(max_requests=4, max_tokens=10**6, capacity=capacity)
    tickets = [admission.admit(1, 1, 0.0) for _ in range(4)]
    for second in range(0, 400, 10):  # each takes 40 s: one leaves every 10 s
        tickets.pop(0).release(second + 10.0)
        tickets.append(admission.admit(1, 1, second + 10.0))
    for num_requests in (1, 3):
        with pytest.raises(errors.QueueFullError) as caught:
            admission.admit(num_requests, 1, 405.0)
        assert caught.value.retry_after_s == pytest.approx(10.0 * num_requests)


def test_the_retry_time_of_a_queue_full_of_tokens_follows_its_requests() -> None:
    admission = Admission(max_requests=100, max_tokens=30, capacity=16)
    tickets = [admission.admit(1, 10, 0.0) for _ in range(3)]
    with pytest.raises(errors.QueueFullError) as caught:
        admission.admit(1, 10, 5.0)
    assert caught.value.retry_after_s == 5.0  # nothing has finished
    for second in range(10, 1000, 10):  # each takes 30 s: one leaves every 10 s
        tickets.pop(0).release(float(second))
        tickets.append(admission.admit(1, 10, float(second)))
    with pytest.raises(errors.QueueFullError) as caught:
        admission.admit(1, 10, 995.0)
    assert caught.value.retry_after_s == pytest.approx(10.0, rel=0.05)


def test_quiet_times_do_not_count_for_the_drain_rate() -> None:
    admission = Admission(max_requests=100, max_tokens=10**6, capacity=10)
    for hour in range(20):
        admission.admit(1, 1, hour * 3600.0).release(hour * 3600.0 + 1)
    for _ in range(50):
        admission.admit(1, 1, 100_000.0)
    assert admission.queue_time_s() == 0.0


def test_a_full_queue_has_room_for_a_tenant_with_little_in_it() -> None:
    admission = Admission(max_requests=12, max_tokens=120)
    greedy = [admission.admit(1, 10, 0.0, tenant="greedy") for _ in range(12)]
    with pytest.raises(errors.QueueFullError, match="12 requests, at most 12"):
        admission.admit(1, 10, 0.0, tenant="greedy")
    modest = [admission.admit(1, 10, 0.0, tenant="modest") for _ in range(3)]
    with pytest.raises(errors.QueueFullError, match="15 requests, at most 12"):
        admission.admit(1, 10, 0.0, tenant="modest")
    third = admission.admit(2, 20, 0.0, tenant="third")
    for ticket in (*greedy, *modest, third):
        ticket.release(1.0)
    assert admission.num_requests == 0
    alone = [admission.admit(1, 10, 2.0, tenant="modest") for _ in range(12)]
    with pytest.raises(errors.QueueFullError):
        admission.admit(1, 10, 2.0, tenant="modest")
    assert len(alone) == 12
