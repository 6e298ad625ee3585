"""Tenants take turns by the tokens that they were served."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from msgspec.structs import replace

from tests.workers.scheduling.test_scheduler import Desk
from workers.requests.request import SamplingParams
from workers.requests.sequence import SequenceState
from workers.scheduling.fairness import ServedTokens


def ask(
    desk: Desk,
    tenant: str,
    length: int = 8,
    *,
    weight: float = 1.0,
    priority: int = 0,
    new: int = 4,
) -> SequenceState:
    """A request of a tenant, at the end of all that have come."""
    (plain,) = desk.add(length, SamplingParams(max_tokens=new), priority=priority)
    desk.scheduler.remove(plain)
    name = f"{tenant}{plain.request.request_id}"
    request = replace(plain.request, request_id=name, tenant=tenant, weight=weight)
    sequence = SequenceState(request, 0, plain.arrival, math.inf)
    desk.scheduler.add(sequence)
    return sequence


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    served, desk = ServedTokens(), Desk()
    sequences = [ask(desk, "a") for _ in range(3)]
    for sequence in sequences:
        served.add(sequence)
    assert list(served.in_turn(sequences)) == sequences


def test_the_tenant_that_was_served_least_goes_first() -> None:
    served, desk = ServedTokens(), Desk()
    a, b = [ask(desk, "a") for _ in range(3)], [ask(desk, "b") for _ in range(3)]
    for sequence in (*b, *a):
        served.add(sequence)
    served.charge(b[0], 12)
    names = [s.request.tenant for s in served.in_turn([*b, *a])]
    assert names == ["a", "a", "b", "a", "b", "b"]


def test_a_tenant_that_comes_back_gets_nothing_for_its_pause() -> None:
    served, desk = ServedTokens(), Desk()
    a, b, c = ask(desk, "a"), ask(desk, "b"), ask(desk, "c")
    for sequence in (a, b):
        served.add(sequence)
    served.charge(a, 100)
    served.charge(b, 60)
    served.add(c)
    served.charge(c, 8)
    assert [s.request.tenant for s in served.in_turn([a, b, c])] == ["b", "c", "a"]
    served.remove(c)
    served.add(c)
    assert [s.request.tenant for s in served.in_turn([a, b, c])] == ["b", "c", "a"]
    for sequence in (a, b, c):
        served.remove(sequence)
    served.add(a)
    served.add(b)
    assert [s.request.tenant for s in served.in_turn([a, b])] == ["a", "b"], "all begin anew"


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_burst_of_one_tenant_does_not_keep_another_waiting(weight: float) -> None:
    desk = Desk(max_num_seqs=4, num_blocks=64)
    for _ in range(60):
        ask(desk, "greedy")
    for _ in range(20):
        ask(desk, "modest", weight=weight)
    ended: Counter[str] = Counter()
    while ended["modest"] < 12:
        ended.update(sequence.request.tenant for sequence in desk.step())
    assert ended["greedy"] == pytest.approx(12 / weight, abs=3)


def test_priority_orders_the_requests_of_one_tenant_alone() -> None:
    desk = Desk(max_num_seqs=2)
    ask(desk, "a", priority=5, new=40)
    ask(desk, "a", priority=5, new=40)
    desk.step()
    foreign = ask(desk, "b", priority=-9)
    assert desk.wanted().prefill_rows == 0, "no preemption of another tenant's"
    desk.scheduler.remove(foreign)
    urgent = ask(desk, "a", priority=0)
    desk.step()
    assert urgent in desk.scheduler.queues.running
    assert [s.request.priority for s in desk.scheduler.queues.running] == [0, 5]


def test_an_urgent_request_takes_the_place_of_its_own_tenant() -> None:
    desk = Desk(max_num_seqs=4)
    others = [ask(desk, "b", new=40) for _ in range(3)]
    (low,) = [ask(desk, "a", priority=5, new=40)]
    desk.step()
    urgent = ask(desk, "a")
    desk.step()
    assert {*others, urgent} == set(desk.scheduler.queues.running)
    assert low not in desk.scheduler.queues.running


def test_blocks_are_taken_from_the_tenant_with_the_most() -> None:
    desk = Desk(num_blocks=16)
    many = [ask(desk, "many", 8, new=30) for _ in range(3)]
    (one,) = [ask(desk, "one", 8, new=30)]
    while not desk.scheduler.preemption.num_preemptions:
        desk.step()
        pressed = desk.scheduler.preemption.candidate()
        assert pressed is None or pressed.request.tenant == "many"
    assert one in desk.scheduler.queues.running
    assert sum(s in desk.scheduler.queues.running for s in many) == 2


def test_no_sequence_is_preempted_that_is_planned_already() -> None:
    desk = Desk(num_blocks=15)
    for tenant, priority in (("many", 0), ("many", 0), ("many", 0), ("one", 9)):
        ask(desk, tenant, 8, new=30, priority=priority)
    desk.step()
    while desk.scheduler.queues.running:
        plan = desk.plan()
        running = desk.scheduler.queues.running
        assert all(planned.sequence in running for planned in plan.rows if planned.is_decode)
        desk.commit(plan)
    assert desk.scheduler.preemption.num_preemptions > 0


def test_the_tenant_with_the_most_is_preempted_whichever_needs_blocks() -> None:
    for num_blocks in range(12, 20):
        desk = Desk(num_blocks=num_blocks)
        many = [ask(desk, "many", 8, new=30) for _ in range(3)]
        (one,) = [ask(desk, "one", 8, new=30)]
        while not desk.scheduler.preemption.num_preemptions:
            desk.step()
        assert one in desk.scheduler.queues.running, num_blocks
        assert sum(s in desk.scheduler.queues.running for s in many) == 2
