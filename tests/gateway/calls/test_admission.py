"""Admission: bounds on requests, tokens and bytes, and retry times."""

from __future__ import annotations

import pytest

from cluster.core import errors
from gateway.calls.admission import Admission, Ticket
from gateway.calls.tenant_queues import CallDemand


def test_admission_bounds_requests_and_gives_places_back_once() -> None:
    admission = Admission(max_requests=2, max_tokens=100, capacity=8)
    first = admission.admit(CallDemand(num_tokens=10), 0.0)
    second = admission.admit(CallDemand(num_tokens=10), 0.0)
    with pytest.raises(errors.QueueFullError, match="at most 2") as caught:
        admission.admit(CallDemand(num_tokens=10), 0.0)
    assert 1 <= caught.value.retry_after_s <= 60
    first.release(1.0)
    first.release(1.0)
    assert (admission.num_requests, admission.num_tokens) == (1, 10)
    second.release(2.0)
    assert (admission.num_requests, admission.num_tokens) == (0, 0)


def test_admission_bounds_bytes_of_embeddings() -> None:
    admission = Admission(max_requests=8, max_tokens=100, capacity=8, max_prompt_bytes=100)
    first = admission.admit(CallDemand(num_bytes=150), 0.0)  # alone, however large
    admission.admit(CallDemand(), 0.0)
    with pytest.raises(errors.QueueFullError, match=r"150 bytes of embeddings, .* needs 10"):
        admission.admit(CallDemand(num_bytes=10), 0.0)
    first.release(1.0)
    first.release(1.0)
    admission.admit(CallDemand(num_bytes=10), 1.0)
    assert admission.num_bytes == 10


def test_admission_bounds_tokens_but_never_a_lone_call() -> None:
    admission = Admission(max_requests=8, max_tokens=100, capacity=8)
    admission.admit(CallDemand(num_tokens=1000), 0.0)
    with pytest.raises(errors.QueueFullError, match="tokens"):
        admission.admit(CallDemand(), 0.0)


def test_the_retry_time_follows_the_drain() -> None:
    admission = Admission(max_requests=100, max_tokens=10**6, capacity=10)
    tickets = [admission.admit(CallDemand(), 0.0) for _ in range(100)]
    assert admission.queue_time_s(CallDemand()) == 0.0
    for place, ticket in enumerate(tickets[:40], start=1):
        ticket.release(place / 2)  # two a second
    assert admission.num_waiting == 50
    assert admission.retry_after_s(20) == pytest.approx(10.0)
    assert admission.queue_time_s(CallDemand()) == pytest.approx(25.0)


@pytest.mark.parametrize("capacity", [4, 16])
def test_the_retry_time_follows_the_drain_of_a_full_queue(capacity: int) -> None:
    """Whether or not the engines could run more than the queue holds."""
    admission = Admission(max_requests=4, max_tokens=10**6, capacity=capacity)
    tickets = [admission.admit(CallDemand(), 0.0) for _ in range(4)]
    for second in range(0, 400, 10):  # each takes 40 s: one leaves every 10 s
        tickets.pop(0).release(second + 10.0)
        tickets.append(admission.admit(CallDemand(), second + 10.0))
    for num_requests in (1, 3):
        with pytest.raises(errors.QueueFullError) as caught:
            admission.admit(CallDemand(num_requests=num_requests), 405.0)
        assert caught.value.retry_after_s == pytest.approx(10.0 * num_requests)


def test_the_retry_time_of_a_queue_full_of_tokens_follows_its_requests() -> None:
    admission = Admission(max_requests=100, max_tokens=30, capacity=16)
    tickets = [admission.admit(CallDemand(num_tokens=10), 0.0) for _ in range(3)]
    with pytest.raises(errors.QueueFullError) as caught:
        admission.admit(CallDemand(num_tokens=10), 5.0)
    assert caught.value.retry_after_s == 5.0  # nothing has finished
    for second in range(10, 1000, 10):  # each takes 30 s: one leaves every 10 s
        tickets.pop(0).release(float(second))
        tickets.append(admission.admit(CallDemand(num_tokens=10), float(second)))
    with pytest.raises(errors.QueueFullError) as caught:
        admission.admit(CallDemand(num_tokens=10), 995.0)
    assert caught.value.retry_after_s == pytest.approx(10.0, rel=0.05)


def test_quiet_times_do_not_count_for_the_drain_rate() -> None:
    admission = Admission(max_requests=100, max_tokens=10**6, capacity=10)
    for hour in range(20):
        admission.admit(CallDemand(), hour * 3600.0).release(hour * 3600.0 + 1)
    for _ in range(50):
        admission.admit(CallDemand(), 100_000.0)
    assert admission.queue_time_s(CallDemand()) == pytest.approx(
        4.0
    )  # ten at once, in a second each


def test_a_full_queue_has_room_for_a_tenant_with_little_in_it() -> None:
    admission = Admission(max_requests=12, max_tokens=120)
    greedy = [admission.admit(CallDemand(num_tokens=10, tenant="greedy"), 0.0) for _ in range(12)]
    with pytest.raises(errors.QueueFullError, match="12 requests, at most 12"):
        admission.admit(CallDemand(num_tokens=10, tenant="greedy"), 0.0)
    modest = [admission.admit(CallDemand(num_tokens=10, tenant="modest"), 0.0) for _ in range(3)]
    with pytest.raises(errors.QueueFullError, match="15 requests, at most 12"):
        admission.admit(CallDemand(num_tokens=10, tenant="modest"), 0.0)
    third = admission.admit(CallDemand(num_requests=2, num_tokens=20, tenant="third"), 0.0)
    for ticket in (*greedy, *modest, third):
        ticket.release(1.0)
    assert admission.num_requests == 0
    alone = [admission.admit(CallDemand(num_tokens=10, tenant="modest"), 2.0) for _ in range(12)]
    with pytest.raises(errors.QueueFullError):
        admission.admit(CallDemand(num_tokens=10, tenant="modest"), 2.0)
    assert len(alone) == 12


def _saturated(max_wait_s: float, tenant: str = "") -> tuple[Admission, list[Ticket]]:
    """Ten run, 40 wait; one of 100 tokens has left every 0.2 s, the last at 4 s."""
    admission = Admission(10**4, 10**6, capacity=10, max_wait_s=max_wait_s)
    tickets = [admission.admit(CallDemand(num_tokens=100, tenant=tenant), 0.0) for _ in range(70)]
    for number in range(20):
        tickets.pop(0).release(0.2 * (number + 1))
    return admission, tickets


def test_the_expected_wait_is_bounded_and_the_retry_time_is_what_exceeds_it() -> None:
    admission, tickets = _saturated(max_wait_s=6.0)
    assert admission.queue_time_s(CallDemand()) == pytest.approx(8.0)
    with pytest.raises(errors.QueueFullError, match=r"wait 8.0 s, at most 6 s") as caught:
        admission.admit(CallDemand(num_tokens=100), 4.0)
    assert caught.value.retry_after_s == pytest.approx(2.0)
    assert caught.value.limit == "queue_wait"
    for number in range(10):
        tickets.pop(0).release(4.0 + 0.2 * number)
    admission.admit(CallDemand(num_tokens=100), 6.0)


def test_a_queue_that_stands_is_kept_short() -> None:
    admission, tickets = _saturated(max_wait_s=3.0)
    with pytest.raises(
        errors.QueueFullError, match=r"at most 1 s \(a third of max_queue_w"
    ) as caught:
        admission.admit(CallDemand(num_tokens=100), 4.0)
    assert caught.value.retry_after_s == pytest.approx(7.0)
    for number in range(35):
        tickets.pop(0).release(4.0 + 0.2 * number)
    admission.admit(CallDemand(num_tokens=100), 11.0)
    for ticket in tickets:
        ticket.release(12.0)
    for _ in range(10 + 15):  # it was empty for over a second
        admission.admit(CallDemand(num_tokens=100), 13.5)
    with pytest.raises(errors.QueueFullError, match=r"at most 3 s"):
        admission.admit(CallDemand(num_tokens=100), 13.5)


def test_the_wait_counts_tokens() -> None:
    admission, _ = _saturated(max_wait_s=3.0)
    admission.admit(CallDemand(num_tokens=4000, priority=1), 4.0)  # behind the others
    assert admission.queue_time_s(CallDemand()) == pytest.approx(8.0)
    assert admission.queue_time_s(CallDemand(priority=1)) == pytest.approx(16.0)


def test_requests_of_lower_priority_wait_as_long_as_it_takes() -> None:
    admission, _ = _saturated(max_wait_s=3.0)
    for _ in range(100):
        admission.admit(CallDemand(num_tokens=100, priority=1), 4.0)
    assert admission.queue_time_s(CallDemand()) == pytest.approx(8.0)
    assert admission.queue_time_s(CallDemand(priority=-1)) == 0.0
    admission.admit(CallDemand(num_tokens=100, priority=-1), 4.0)


def test_a_queue_that_has_just_formed_takes_a_batch() -> None:
    admission, tickets = _saturated(max_wait_s=1.0)
    for ticket in tickets:
        ticket.release(5.0)
    for number in range(100):
        admission.admit(CallDemand(num_tokens=100), 100.0 + number / 100)
    with pytest.raises(errors.QueueFullError, match="max_queue_wait_s"):
        admission.admit(CallDemand(num_tokens=100), 101.5)


def test_a_queue_that_was_empty_for_a_moment_takes_no_batch() -> None:
    """Requests that began together end together."""
    admission, tickets = _saturated(max_wait_s=1.0)
    for ticket in tickets:
        ticket.release(5.0)
    for _ in range(10 + 13):  # 60 have left in 5 s: of 12 waiting ones the last waits for 1 s
        admission.admit(CallDemand(num_tokens=100), 6.5)
    with pytest.raises(errors.QueueFullError, match="max_queue_wait_s"):
        admission.admit(CallDemand(num_tokens=100), 6.5)


def test_a_greedy_tenant_makes_no_other_wait() -> None:
    admission, _ = _saturated(max_wait_s=3.0, tenant="greedy")
    with pytest.raises(errors.QueueFullError):
        admission.admit(CallDemand(num_tokens=100, tenant="greedy"), 4.0)
    modest = CallDemand(num_tokens=100, tenant="modest")
    for _ in range(5):  # half of the places
        assert admission.queue_time_s(modest) == 0.0
        admission.admit(modest, 4.0)
    admission.admit(modest, 4.0)
    # the one that waits, and as much of the other tenant
    assert admission.queue_time_s(modest) == pytest.approx(0.4)


def test_what_leaves_without_being_served_is_no_drain() -> None:
    admission, tickets = _saturated(max_wait_s=3.0)
    before = admission.queue_time_s(CallDemand())
    for _ in range(20):
        tickets.pop().release(4.0, was_served=False)
    assert admission.queue_time_s(CallDemand()) == pytest.approx(before / 2)


def test_each_choice_takes_a_place() -> None:
    admission = Admission(100, 10**6, capacity=10, max_wait_s=3.0)
    calls = [admission.admit(CallDemand(num_choices=5, num_tokens=100), 0.0) for _ in range(50)]
    assert admission.num_waiting == 240
    for number in range(10):
        calls.pop(0).release(number + 1.0)
    assert admission.queue_time_s(CallDemand()) == pytest.approx(38.0)  # two of 40 run
    with pytest.raises(errors.QueueFullError, match="max_queue_wait_s"):
        admission.admit(CallDemand(num_choices=5, num_tokens=100), 10.0)
    for call in calls:
        call.release(11.0)
    assert not admission.num_seats


def test_a_tenant_with_little_may_send_embeddings_where_another_has_sent_all() -> None:
    admission = Admission(100, 10**6, max_prompt_bytes=100)
    for _ in range(2):
        admission.admit(CallDemand(num_bytes=50, tenant="greedy"), 0.0)
    with pytest.raises(errors.QueueFullError, match="100 bytes of embeddings"):
        admission.admit(CallDemand(num_bytes=1, tenant="greedy"), 0.0)
    admission.admit(CallDemand(num_bytes=25, tenant="modest"), 0.0)
    with pytest.raises(errors.QueueFullError, match="125 bytes of embeddings"):
        admission.admit(CallDemand(num_bytes=1, tenant="modest"), 0.0)


def test_the_retry_time_of_a_long_request_is_that_of_as_many_tokens() -> None:
    admission = Admission(1000, 5000, capacity=10)
    calls = [admission.admit(CallDemand(num_tokens=100), 0.0) for _ in range(50)]
    for number in range(10):
        calls.pop(0).release(0.5 * (number + 1))  # 200 tokens a second
    with pytest.raises(errors.QueueFullError) as caught:
        admission.admit(CallDemand(num_tokens=3000), 5.0)
    assert caught.value.retry_after_s == pytest.approx(10.0)
