"""Seats that a greedy tenant leaves free for others."""

from __future__ import annotations

import math
from collections import Counter
from itertools import count

import pytest

from tests.workers.scheduling.planner import Planner
from workers.kv.block_pool import BlockPool
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.seat_reserve import SeatReserve

pytestmark = pytest.mark.heavy

SEATS = 32
"""Two of which are left free."""


class Desk(Planner):
    """A scheduler whose sequences have one prompt token each."""

    def __init__(self, num_blocks: int = 10_000) -> None:
        scheduler = Scheduler(
            BlockPool(num_blocks),
            block_size=4,
            max_num_seqs=SEATS,
            max_num_batched_tokens=1000,
            max_model_len=100,
            eos_token_ids=(),
            enable_prefix_caching=False,
        )
        super().__init__(scheduler)
        self._numbers = count()

    def add(self, tenant: str, number: int, weight: float = 1.0, prompt: int = 1) -> None:
        params = SamplingParams(max_tokens=50)
        for _ in range(number):
            order = next(self._numbers)
            request = Request(
                request_id=f"r{order}",
                prompt=(5,) * prompt,
                params=params,
                tenant=tenant,
                weight=weight,
            )
            self.scheduler.add(SequenceState(request, 0, order, math.inf))

    def step(self) -> Counter[str]:
        """One step; running sequences by tenant."""
        self.rows()
        return Counter(s.request.tenant for s in self.scheduler.queues.running)

    def rows(self) -> Counter[str]:
        """One step; its rows by tenant."""
        wanted = self.wanted()
        plan = self.grant(wanted.decode_rows, wanted.prefill_rows)
        rows: Counter[str] = Counter()
        for planned in plan.rows:
            rows[planned.sequence.request.tenant] += planned.count
        assert rows.total() == wanted.decode_rows + wanted.prefill_rows
        self.scheduler.commit(plan, {p.sequence: (7,) for p in plan.rows if p.samples_token}, ())
        self.scheduler.check_integrity()
        return rows

    def end(self, tenant: str) -> None:
        for sequence in tuple(self.scheduler.queues.running):
            if sequence.request.tenant == tenant:
                self.scheduler.remove(sequence)


def mostly_a() -> Desk:
    """21 sequences decode, one of them of tenant b."""
    desk = Desk()
    desk.add("b", 1)
    desk.add("a", 20)
    desk.step()
    return desk


def test_a_tenant_alone_has_all_seats() -> None:
    desk = Desk()
    desk.add("a", 100)
    assert desk.step() == {"a": SEATS}


def test_a_tenant_above_its_share_leaves_seats_for_others() -> None:
    desk = Desk()
    desk.add("b", 1)
    desk.add("a", 100)
    assert desk.step() == {"a": SEATS - 3, "b": 1}
    desk.add("b", 2)  # at once, though nothing has ended
    assert desk.step() == {"a": SEATS - 3, "b": 3}


def test_the_seats_stay_free_for_a_while_after_the_other_has_gone() -> None:
    desk = Desk()
    desk.add("b", 1)
    desk.add("a", 100)
    desk.step()
    desk.end("b")
    assert desk.step() == {"a": SEATS - 2}
    desk.end("a")
    for _ in range(2500):
        desk.add("a", max(0, SEATS - len(desk.scheduler.queues.waiting)))
        found = desk.step()
        if found["a"] == SEATS:
            return
    raise AssertionError("the seats stay free for ever")


def test_greedy_tenants_share_all_seats_by_weight() -> None:
    desk = Desk()
    desk.add("a", 100, weight=3.0)
    desk.add("b", 100)
    found = desk.step()
    assert found.total() == SEATS
    assert found["a"] > found["b"]


def test_blocks_are_left_free_with_the_seats() -> None:
    """Each sequence has a block, and a free one beside it that it may need soon."""
    desk = Desk(num_blocks=32)
    desk.add("b", 1)
    desk.step()
    desk.add("a", 100)
    desk.step()
    free = len(desk.scheduler.queues.running)
    desk.add("b", 1)
    assert desk.step()["b"] == 2
    assert free == 15  # alone it would have 16


def test_no_more_than_that_part_of_the_blocks_is_left_free() -> None:
    """Four long sequences fit; a reserve of two such would leave half of the blocks free."""
    desk = Desk(num_blocks=24)
    desk.add("b", 1)
    desk.step()
    desk.end("b")
    desk.add("a", 10, prompt=16)
    assert desk.step() == {"a": 4}


def test_most_of_the_decodes_give_way_to_a_first_token_of_another_tenant() -> None:
    desk = mostly_a()
    desk.add("b", 1, prompt=12)
    assert desk.rows() == {"b": 13}
    desk.add("b", 1, prompt=12)
    assert desk.rows() == {"a": 20, "b": 14}  # not twice in a row
    assert desk.rows() == {"a": 20, "b": 3}


def test_decodes_give_way_once_where_the_prompt_gets_no_rows() -> None:
    desk = mostly_a()
    desk.end("b")
    desk.add("b", 1)
    for num_decodes in (0, 20):  # the engine does not commit a plan without rows
        wanted = desk.wanted()
        assert wanted.decode_rows == num_decodes
        assert len(desk.grant(wanted.decode_rows, 0).rows) == num_decodes


def test_decodes_that_were_granted_before_do_not_give_way() -> None:
    desk = mostly_a()
    granted = desk.wanted()
    desk.add("b", 1)
    assert desk.wanted().decode_rows == 1
    plan = desk.grant(granted.decode_rows, granted.prefill_rows)
    assert len(plan.rows) == 21


def test_equal_tenants_give_no_way() -> None:
    desk = Desk()
    desk.add("a", 10)
    desk.add("b", 9)
    desk.step()
    desk.add("b", 1)
    assert desk.rows() == {"a": 10, "b": 10}


def test_decodes_do_not_give_way_to_what_is_longer_than_they_are() -> None:
    desk = mostly_a()
    desk.add("b", 1, prompt=21)
    assert desk.rows() == {"a": 20, "b": 22}
    desk.add("a", 1, prompt=12)  # nor to their own tenant
    assert desk.rows() == {"a": 32, "b": 2}


def test_few_of_the_decodes_do_not_give_way() -> None:
    desk = Desk()
    for tenant, number in (("a", 5), ("b", 3), ("c", 3)):
        desk.add(tenant, number)
    desk.step()
    desk.add("c", 1)
    assert desk.rows() == {"a": 5, "b": 3, "c": 4}


def test_prompts_of_who_gives_way_run_beside_the_first_token() -> None:
    desk = mostly_a()
    desk.add("b", 1, prompt=12)
    desk.add("a", 1, prompt=3)
    assert desk.rows() == {"b": 13, "a": 3}


def sequence_of(tenant: str, weight: float = 1.0) -> SequenceState:
    request = Request(
        request_id="r", prompt=(5,), params=SamplingParams(), tenant=tenant, weight=weight
    )
    return SequenceState(request, 0, 0, math.inf)


def reserve_of(num_seats: int = SEATS, **weights: float) -> SeatReserve:
    """A reserve that knows these tenants since step 0."""
    reserve = SeatReserve(num_seats)
    for tenant, weight in weights.items():
        reserve.note(sequence_of(tenant, weight))
    return reserve


def running(names: str) -> Counter[str]:
    """A running sequence for each tenant, one letter each."""
    return Counter(names)


@pytest.mark.parametrize(
    ("names", "above"),
    [("", set()), ("a", set()), ("aa", {"a"}), ("aab", set()), ("aaab", {"a"}), ("aaabbb", set())],
)
def test_above_its_share_is_who_has_more_than_one_and_more_than_that_of_one_more(
    names: str, above: set[str]
) -> None:
    """Of two equal ones: more than 1.5 of 3, 2 of 4, 2.5 of 5, 3.5 of 7."""
    assert reserve_of(a=1, b=1).above_share(running(names)) == above


def test_shares_are_those_of_the_weights() -> None:
    reserve = reserve_of(a=3, b=1)
    assert reserve.above_share(running("aaa")) == set()
    assert reserve.above_share(running("aaaabb")) == {"b"}
    assert reserve_of(a=1).above_share(running("aaa")) == set(), "alone it has all"


@pytest.mark.parametrize(
    ("num_seats", "names", "num_free"),
    [
        (32, "", {"a": 0, "b": 0}),
        (32, "a", {"a": 2, "b": 0}),
        (32, "ab", {"a": 0, "b": 0}),
        (32, "aab", {"a": 2, "b": 0}),
        (31, "aab", {"a": 1, "b": 0}),
        (16, "aab", {"a": 1, "b": 0}),
        (15, "aab", {"a": 0, "b": 0}),
    ],
)
def test_one_in_sixteen_seats_is_left_free_by_who_has_its_share(
    num_seats: int, names: str, num_free: dict[str, int]
) -> None:
    left = reserve_of(num_seats, a=1, b=1).seats_left_free(running(names))
    assert {tenant: left.of(sequence_of(tenant)) for tenant in "ab"} == num_free


def test_a_seat_that_is_taken_counts() -> None:
    left = reserve_of(a=1, b=1).seats_left_free(running("b"))
    left.take(sequence_of("a"))
    assert left.of(sequence_of("a")) == 0
    left.take(sequence_of("a"))
    assert left.of(sequence_of("a")) == 2


def test_a_tenant_alone_leaves_no_seat_free() -> None:
    left = reserve_of(a=1).seats_left_free(running("aaaa"))
    left.take(sequence_of("a"))
    assert left.of(sequence_of("a")) == 0


@pytest.mark.parametrize(
    ("noted_at", "num_steps", "is_known"),
    [(0, 1999, True), (0, 2000, False), (999, 2000, False), (1000, 2000, True)],
)
def test_a_tenant_without_sequences_is_known_for_a_thousand_steps(
    noted_at: int, num_steps: int, is_known: bool
) -> None:
    reserve = SeatReserve(SEATS)
    for step in range(num_steps):
        if step == noted_at:
            reserve.note(sequence_of("a"))
        reserve.note(sequence_of("b"))
        reserve.count_step([sequence_of("b")])
    assert reserve.above_share(running("bb")) == ({"b"} if is_known else set())


def test_a_tenant_whose_sequences_run_is_known() -> None:
    reserve = reserve_of(a=1, b=1)
    for _ in range(2000):
        reserve.count_step(map(sequence_of, "ab"))
    assert reserve.above_share(running("abbb")) == {"b"}
