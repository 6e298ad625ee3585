"""The scheduler of a model with recurrent states: each row reads the state of its own tokens.

Slots hold what they stand for, the tokens behind which the state is; a plan is run by adding the
tokens of its rows, in one micro-batch or two.
"""

from __future__ import annotations

import math
import random

import pytest

from tests.workers.scheduling.planner import Planner
from workers.kv.block_pool import BlockPool
from workers.kv.state_slots import StateSlots
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState, SequenceStatus
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_plan import PlannedRows, StepPlan

pytestmark = pytest.mark.heavy

BLOCK = 4
NEVER = SamplingParams(max_tokens=8, ignore_eos=True)


class Desk(Planner):
    """A scheduler, and a model whose states are the tokens that made them."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_num_seqs: int = 6,
        num_cached_states: int = 4,
        max_rows: int = 24,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.states = StateSlots(3 * max_num_seqs + num_cached_states, max_num_seqs)
        scheduler = Scheduler(
            self.pool,
            block_size=BLOCK,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_rows,
            max_model_len=100,
            eos_token_ids=(2,),
            enable_prefix_caching=enable_prefix_caching,
            states=self.states,
        )
        super().__init__(scheduler)
        self.contents: dict[int, tuple[int, ...]] = {self.states.zero: ()}
        self.num_computed = 0
        self._arrivals = 0

    def add(
        self, prompt: tuple[int, ...], n: int = 1, output: tuple[int, ...] = ()
    ) -> list[SequenceState]:
        request = Request(request_id=f"r{self._arrivals}", prompt=prompt, params=NEVER, n=n)
        found: list[SequenceState] = []
        for choice in range(n):
            first = found[0] if found else None
            sequence = SequenceState(
                request, choice, self._arrivals, math.inf, output=list(output), first_choice=first
            )
            self.scheduler.add(sequence)
            found.append(sequence)
        self._arrivals += 1
        return found

    def plan(self) -> StepPlan:
        wanted = self.wanted()
        plan = self.grant(wanted.decode_rows, wanted.prefill_rows)
        assert plan.rows or not (self.scheduler.queues.running or self.scheduler.queues.waiting)
        self.scheduler.check_integrity(plan=plan)
        return plan

    def run(self, plan: StepPlan, rng: random.Random) -> None:
        """In two micro-batches, cut anywhere; what is read must not change."""
        read = {p.states.read for p in plan.rows if p.states is not None}
        before = {slot: self.contents[slot] for slot in read}
        for planned in plan.rows:
            end = planned.first + planned.count
            cut = rng.randint(planned.first, end)
            for first, last in ((planned.first, cut), (cut, end)):
                if first < last:
                    self._run_rows(planned, first, last)
        assert before == {slot: self.contents[slot] for slot in read}

    def _run_rows(self, planned: PlannedRows, first: int, last: int) -> None:
        assert planned.states is not None
        for run in planned.states.runs(first, last):
            tokens = tuple(planned.sequence.tokens(0, run.last))
            assert self.contents[run.read] == tokens[: run.first], "the state of other tokens"
            assert run.write != self.states.zero
            self.contents[run.write] = tokens
            self.num_computed += run.last - run.first

    def commit(
        self, plan: StepPlan, token: int = 50, failed: tuple[SequenceState, ...] = ()
    ) -> None:
        drawn = {
            p.sequence: (token,) for p in plan.rows if p.samples_token and p.sequence not in failed
        }
        self.scheduler.commit(plan, drawn, failed)
        self.scheduler.check_integrity()
        for slot, tokens in self.contents.items():
            assert slot == self.states.zero or tokens

    def serve(self, prompt: tuple[int, ...], n: int = 1) -> int:
        """Serve a request to its end; returns the rows that were computed."""
        before, sequences = self.num_computed, self.add(prompt, n)
        while any(s.status is not SequenceStatus.FINISHED for s in sequences):
            plan = self.plan()
            self.run(plan, random.Random(1))
            self.commit(plan)
        return self.num_computed - before


def prompt_of(length: int, *tail: int) -> tuple[int, ...]:
    return (*range(100, 100 + length), *tail)


def test_the_same_prompt_is_computed_from_its_last_full_block() -> None:
    for length in (3, 4, 5, 8, 9, 31, 32, 33):
        desk = Desk()
        num_decodes = NEVER.max_tokens - 1
        assert desk.serve(prompt_of(length)) == length + num_decodes
        left = length - (length - 1) // BLOCK * BLOCK
        assert desk.serve(prompt_of(length)) == left + num_decodes


def test_a_longer_prompt_goes_on_from_an_output() -> None:
    desk = Desk()
    desk.serve(prompt_of(10))
    longer = (*prompt_of(10), *[50] * NEVER.max_tokens, 7)
    cached = (10 + NEVER.max_tokens - 1) // BLOCK * BLOCK
    assert desk.serve(longer) == len(longer) - cached + NEVER.max_tokens - 1


def test_the_second_prompt_finds_where_others_branch_off() -> None:
    desk, rows = Desk(), []
    for tail in (1, 2, 3):
        rows.append(desk.serve(prompt_of(17, *[tail] * 9)) - NEVER.max_tokens + 1)
    assert rows == [26, 26, 26 - 16]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_choices_go_on_from_the_state_of_the_first(enable_prefix_caching: bool) -> None:
    desk = Desk(enable_prefix_caching=enable_prefix_caching)
    num_rows = desk.serve(prompt_of(11), n=3)
    assert num_rows == 8 + 3 * (11 - 8) + 3 * (NEVER.max_tokens - 1)


def test_without_slots_for_prefixes_prompts_are_computed_again() -> None:
    desk = Desk(max_num_seqs=1, num_cached_states=0)
    for _ in range(3):
        desk.serve(prompt_of(30))
        desk.serve(tuple(range(50)))
    assert desk.states.num_free == desk.states.num_slots


def test_a_failed_sequence_leaves_no_state() -> None:
    desk = Desk()
    (sequence,) = desk.add(prompt_of(9))
    plan = desk.plan()
    desk.run(plan, random.Random(1))
    desk.commit(plan, failed=(sequence,))
    assert desk.serve(prompt_of(9)) == 9 + NEVER.max_tokens - 1


def test_an_abandoned_plan_leaves_all_states_as_they_were() -> None:
    desk = Desk()
    desk.add(prompt_of(30))
    for _ in range(3):
        free, holders = desk.states.num_free, dict(desk.contents)
        plan = desk.plan()
        desk.run(plan, random.Random(1))
        desk.scheduler.abandon(plan)
        desk.scheduler.check_integrity()
        assert desk.states.num_free == free
        assert all(desk.contents[slot] == tokens for slot, tokens in holders.items() if not tokens)
        plan = desk.plan()
        desk.run(plan, random.Random(2))
        desk.commit(plan)


@pytest.mark.parametrize("seed", range(12))
def test_random_life_reads_no_other_state(seed: int) -> None:
    rng = random.Random(seed)
    desk = Desk(
        num_blocks=rng.choice([26, 40, 90]),
        max_num_seqs=rng.choice([1, 3, 6]),
        num_cached_states=rng.choice([0, 1, 8]),
        max_rows=rng.choice([6, 13, 32]),
        enable_prefix_caching=rng.random() < 0.8,
    )
    alive: list[SequenceState] = []
    loans: list[int] = []
    for _ in range(400):
        if rng.random() < 0.3 and len(alive) < 20:
            prompt = prompt_of(rng.choice([0, 4, 9, 16, 30]), *rng.choices(range(3), k=3))
            alive += desk.add(
                prompt[: rng.randint(1, 33)],
                n=rng.choice([1, 1, 3]),
                output=tuple(rng.choices(range(40, 42), k=rng.choice([0, 0, 2, 5]))),
            )
        if rng.random() < 0.1 and alive:
            desk.scheduler.remove(rng.choice(alive))
        if rng.random() < 0.1:
            slot = desk.states.allocate_extra()
            loans += [] if slot is None else [slot]
            desk.contents |= {} if slot is None else {slot: (1, 2, 3)}
        if rng.random() < 0.1 and loans:
            desk.states.release_extra(loans.pop())
        plan = desk.plan()
        desk.run(plan, rng)
        if rng.random() < 0.15:
            desk.scheduler.abandon(plan)
            desk.scheduler.check_integrity()
        else:
            planned = [p.sequence for p in plan.rows]
            failed = tuple(s for s in planned if rng.random() < 0.03)
            desk.commit(plan, rng.choice([40, 41]), failed)
        alive = [s for s in alive if s.status is not SequenceStatus.FINISHED]
    for sequence in alive:
        desk.scheduler.remove(sequence)
    for slot in loans:
        desk.states.release_extra(slot)
    assert desk.states.num_free == desk.states.num_slots
    assert desk.pool.num_free == desk.pool.num_blocks
