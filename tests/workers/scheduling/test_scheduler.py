"""The scheduler alone: which sequences run, wait or are preempted, and abandoned plans."""

from __future__ import annotations

import math
import random

import pytest
from msgspec.structs import replace

from cluster.config.speculation import SpeculationSection
from tests.workers.scheduling.planner import Planner
from workers.kv.block_pool import BlockPool
from workers.requests.request import BeamParams, FinishReason, Request, SamplingParams
from workers.requests.sequence import SequenceState, SequenceStatus
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import Restriction
from workers.scheduling.step_plan import RowsWanted, StepPlan
from workers.speculation.speculator import Speculator

EOS = 2


class Desk(Planner):
    """A scheduler with 4-token blocks, and the bookkeeping that an engine does around it."""

    def __init__(
        self,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        max_rows: int = 32,
        max_len: int = 100,
        enable_prefix_caching: bool = True,
        length_matters_above: int | None = None,
        speculator: Speculator | None = None,
        max_kept: int = 0,
    ) -> None:
        self.speculator = speculator
        self.pool = BlockPool(num_blocks, max_kept)
        scheduler = Scheduler(
            self.pool,
            block_size=4,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_rows,
            max_model_len=max_len,
            eos_token_ids=(EOS,),
            enable_prefix_caching=enable_prefix_caching,
            length_matters_above=length_matters_above,
            speculator=speculator,
            max_draft_rows=4,
        )
        super().__init__(scheduler)
        self._arrivals = 0

    def add(
        self,
        prompt_length: int,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        n: int = 1,
        output: tuple[int, ...] = (),
        first_token: int | None = None,
        cache_salt: str = "",
        adapter: str = "",
    ) -> list[SequenceState]:
        """A request with a prompt of its own, or one that counts up from ``first_token``."""
        first = 10 + 1000 * self._arrivals if first_token is None else first_token
        request = Request(
            request_id=f"r{self._arrivals}",
            prompt=tuple(range(first, first + prompt_length)),
            params=params or SamplingParams(max_tokens=8),
            n=n,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
        )
        found: list[SequenceState] = []
        for choice in range(n):
            sequence = SequenceState(
                request,
                choice,
                self._arrivals,
                math.inf,
                output=list(output),
                first_choice=found[0] if found else None,
            )
            self.scheduler.add(sequence)
            found.append(sequence)
        self._arrivals += 1
        return found

    def plan(self) -> StepPlan:
        wanted = self.wanted()
        plan = self.grant(wanted.decode_rows, wanted.prefill_rows)
        self.scheduler.check_integrity()
        return plan

    def commit(self, plan: StepPlan, token: int = 50) -> dict[SequenceState, FinishReason]:
        """All drafts are accepted."""
        drawn = {p.sequence: (token,) * (1 + len(p.drafts)) for p in plan.rows if p.samples_token}
        endings = self.scheduler.commit(plan, drawn, ())
        self.scheduler.check_integrity()
        for planned in plan.rows:
            if self.speculator is not None and (tokens := drawn.get(planned.sequence)):
                self.speculator.commit(planned.sequence, planned.drafts, tokens)
        return {s: e.reason for s, e in endings.items()}

    def step(self, token: int = 50) -> dict[SequenceState, FinishReason]:
        return self.commit(self.plan(), token)


def rows(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    """(request, first, count, is decode) of each entry."""
    return [(p.sequence.request.request_id, p.first, p.count, p.is_decode) for p in plan.rows]


def test_drafts_get_the_blocks_that_they_need() -> None:
    section = SpeculationSection(speculative_method="ngram", num_speculative_tokens=4)
    desk = Desk(speculator=Speculator(section, 100, (EOS,)))
    (sequence,) = desk.add(6, SamplingParams(max_tokens=60))
    lengths = set()
    while sequence.status is not SequenceStatus.FINISHED:
        wanted = desk.wanted()
        plan = desk.plan()
        (planned,) = plan.rows
        assert wanted.draft_rows == len(planned.drafts)
        assert len(sequence.blocks) == -(-(sequence.num_tokens + len(planned.drafts)) // 4)
        lengths.add(len(planned.drafts))
        desk.commit(plan)
        if sequence.blocks:
            assert len(sequence.blocks) == -(-sequence.num_computed // 4)
    assert lengths >= {0, 1, 4}


def test_drafts_have_the_rows_that_are_left_beside_the_decodes() -> None:
    section = SpeculationSection(speculative_method="ngram", num_speculative_tokens=4)
    desk = Desk(max_num_seqs=2, speculator=Speculator(section, 100, (EOS,)))
    for _ in range(2):
        desk.add(6, SamplingParams(max_tokens=40))
    found = set[int]()
    for _ in range(8):
        wanted = desk.wanted()
        found.add(wanted.draft_rows)
        assert wanted.decode_rows <= 2 + 4
        desk.step()
    assert max(found) == 4


def test_prompt_is_prefilled_then_decoded_to_its_limit() -> None:
    desk = Desk()
    (sequence,) = desk.add(6, SamplingParams(max_tokens=3))
    assert desk.wanted().prefill_rows == 6
    plan = desk.plan()
    assert rows(plan) == [("r0", 0, 6, False)]
    assert not desk.commit(plan)
    plan = desk.plan()
    assert rows(plan) == [("r0", 6, 1, True)]
    assert not desk.commit(plan)
    assert desk.step() == {sequence: FinishReason.LENGTH}
    assert sequence.output == [50, 50, 50]
    assert desk.pool.num_free == desk.pool.num_blocks


def test_long_prompt_goes_in_chunks_beside_decodes() -> None:
    desk = Desk(max_rows=8)
    desk.add(3)
    desk.step()
    desk.add(20)
    counts = []
    for _ in range(3):
        assert desk.wanted().prefill_rows <= 7
        plan = desk.plan()
        counts.append(rows(plan))
        desk.commit(plan)
    assert counts[0] == [("r0", 3, 1, True), ("r1", 0, 7, False)]
    assert counts[1] == [("r0", 4, 1, True), ("r1", 7, 7, False)]
    assert counts[2] == [("r0", 5, 1, True), ("r1", 14, 6, False)]


def test_grant_may_be_smaller_than_wanted() -> None:
    desk = Desk()
    desk.add(5)
    desk.add(5)
    desk.step()
    desk.add(9)
    assert desk.wanted().decode_rows == 2
    plan = desk.grant(1, 4)
    assert rows(plan) == [("r0", 5, 1, True), ("r2", 0, 4, False)]
    desk.commit(plan)
    plan = desk.grant(0, 0)
    assert plan.num_rows == 0
    desk.commit(plan)


def test_a_grant_above_the_budget_of_a_rank_is_cut() -> None:
    desk = Desk(max_rows=8)
    desk.add(3)
    desk.add(3)
    desk.step()
    desk.add(20)
    assert rows(desk.grant(2, 100)) == [
        ("r0", 3, 1, True),
        ("r1", 3, 1, True),
        ("r2", 0, 6, False),
    ]


def test_a_prompt_for_which_no_row_is_left_is_not_in_the_plan() -> None:
    desk = Desk(max_rows=8)
    desk.add(20)
    desk.add(4)
    desk.step()
    assert rows(desk.plan()) == [("r0", 8, 8, False)]
    assert len(desk.scheduler.queues.waiting) == 1


def test_nothing_is_preempted_while_no_prompt_row_is_granted() -> None:
    desk = Desk(max_num_seqs=1)
    desk.add(4, priority=1)
    desk.step()
    desk.add(4)
    assert rows(desk.grant(1, 0)) == [("r0", 4, 1, True)]
    assert desk.scheduler.preemption.num_preemptions == 0


def test_nothing_is_preempted_for_a_request_that_may_not_run() -> None:
    desk = Desk(max_num_seqs=1)
    desk.add(4, priority=1)
    desk.step()
    desk.add(4)
    desk.restriction = Restriction(held_requests={"r1"})
    assert desk.wanted().prefill_rows == 0
    assert rows(desk.grant(1, 8)) == [("r0", 4, 1, True)]


def test_lower_priority_value_runs_first() -> None:
    desk = Desk(max_num_seqs=1)
    desk.add(4, priority=5)
    desk.add(4, priority=1)
    assert rows(desk.plan()) == [("r1", 0, 4, False)]


def test_seats_are_limited() -> None:
    desk = Desk(max_num_seqs=2)
    for _ in range(3):
        desk.add(4)
    assert desk.wanted().prefill_rows == 8
    assert len(desk.plan().rows) == 2


def test_newest_gives_way_when_blocks_run_out() -> None:
    desk = Desk(num_blocks=5)
    (oldest,) = desk.add(8, SamplingParams(max_tokens=8))
    (newest,) = desk.add(7, SamplingParams(max_tokens=8))
    desk.step()
    assert desk.pool.num_free == 1  # admission left it for r0
    while oldest.num_tokens < 13:
        desk.commit(desk.grant(1, 0))
    assert desk.pool.num_free == 0
    plan = desk.plan()  # r0 needs a fourth block
    assert rows(plan) == [("r0", 12, 1, True)]
    assert newest.status is SequenceStatus.WAITING
    assert newest.num_computed == 0
    assert newest.output == [50]
    assert desk.scheduler.preemption.num_preemptions == 1
    desk.commit(plan)
    while oldest.status is not SequenceStatus.FINISHED:
        desk.step()
    plan = desk.plan()  # r0 is done and had one of its blocks: r1 is recomputed from there
    assert rows(plan) == [("r1", 4, 4, False)]
    assert plan.rows[0].samples_token


def test_lower_priority_gives_way_before_the_newer() -> None:
    desk = Desk(num_blocks=8)
    (low,) = desk.add(8, SamplingParams(max_tokens=12), priority=1)
    (old,) = desk.add(8, SamplingParams(max_tokens=12))
    (new,) = desk.add(8, SamplingParams(max_tokens=12))
    while not desk.scheduler.preemption.num_preemptions:
        desk.step()
    assert low.status is SequenceStatus.WAITING
    assert desk.scheduler.queues.running == [old, new]


def test_the_next_to_be_preempted_is_named_before_blocks_run_out() -> None:
    desk = Desk(num_blocks=14)
    (first,) = desk.add(8, SamplingParams(max_tokens=40))
    desk.step()
    assert desk.scheduler.preemption.candidate() is None
    (last,) = desk.add(8, SamplingParams(max_tokens=40))
    seen = []
    while not desk.scheduler.preemption.num_preemptions:
        desk.step()
        seen.append((desk.scheduler.preemption.candidate(), desk.pool.num_free))
    assert seen[0][0] is None
    named = [(sequence, free) for sequence, free in seen if sequence is not None]
    assert named[0] == (last, 3), "fewer than two blocks for each"
    assert {sequence for sequence, _ in named} == {last}
    assert desk.scheduler.queues.running == [first]
    assert desk.scheduler.preemption.candidate() is None, "one alone goes on to its end"


def test_a_search_is_not_asked_to_move_before_blocks_run_out() -> None:
    """It would begin anew elsewhere; what can go on there is named in its place."""
    desk = Desk(num_blocks=14)
    (first,) = desk.add(8, SamplingParams(max_tokens=40))
    desk.add(8, SamplingParams(max_tokens=40, beams=BeamParams()))
    seen = set()
    while not desk.scheduler.preemption.num_preemptions:
        desk.step()
        seen.add(desk.scheduler.preemption.candidate())
    assert seen == {None, first}


def test_a_sequence_with_output_of_another_worker_goes_before_new_ones() -> None:
    desk = Desk(max_num_seqs=1)
    desk.add(4)
    desk.step()
    desk.add(4)
    request = replace(desk.add(4)[0].request, request_id="moved", output_so_far=((50, 51),))
    moved = SequenceState(request, 0, 99, math.inf, output=[50, 51])
    desk.scheduler.add(moved)
    while moved.status is SequenceStatus.WAITING:
        desk.step()
    assert desk.scheduler.queues.running == [moved]


def test_urgent_request_takes_the_seat_of_the_last_with_lower_priority() -> None:
    desk = Desk(max_num_seqs=2)
    (first,), (last,) = desk.add(4, priority=1), desk.add(4, priority=1)
    desk.step()
    desk.add(4, priority=1)  # not more urgent: it waits
    assert desk.wanted().prefill_rows == 0
    (urgent,) = desk.add(6)
    assert desk.wanted().prefill_rows == 6
    plan = desk.plan()
    assert rows(plan) == [("r0", 4, 1, True), ("r3", 0, 6, False)]
    assert last.status is SequenceStatus.WAITING
    assert desk.scheduler.queues.running == [urgent, first]
    assert desk.scheduler.preemption.num_preemptions == 1


def test_urgent_request_takes_blocks_only_if_that_is_enough_for_it() -> None:
    desk = Desk(num_blocks=8)
    (equal,) = desk.add(12, SamplingParams(max_tokens=9))
    (low,) = desk.add(8, SamplingParams(max_tokens=9), priority=2)
    desk.step()
    (too_large,) = desk.add(20, SamplingParams(max_tokens=1), priority=1)
    assert [p.sequence for p in desk.plan().rows] == [equal, low]
    desk.scheduler.remove(too_large)
    (fitting,) = desk.add(12, SamplingParams(max_tokens=1), priority=1)
    assert [p.sequence for p in desk.plan().rows] == [equal, fitting]
    assert low.status is SequenceStatus.WAITING


def test_urgent_request_needs_no_blocks_for_what_it_shares_with_those_that_stay() -> None:
    desk = Desk(num_blocks=8)
    (equal,) = desk.add(12, SamplingParams(max_tokens=9), first_token=10)
    (low,) = desk.add(8, SamplingParams(max_tokens=9), priority=1)
    desk.step()
    (urgent,) = desk.add(24, SamplingParams(max_tokens=1), first_token=10)
    assert rows(desk.plan()) == [("r0", 12, 1, True), ("r2", 12, 12, False)]
    assert low.status is SequenceStatus.WAITING
    assert urgent.blocks[:3] == equal.blocks[:3]


def test_urgent_prompt_goes_before_the_rest_of_a_long_one() -> None:
    desk = Desk(max_rows=8)
    desk.add(20)
    desk.step()
    desk.add(3, priority=-1)
    assert rows(desk.plan()) == [("r1", 0, 3, False), ("r0", 8, 5, False)]


def test_admission_leaves_blocks_for_those_that_grow() -> None:
    desk = Desk(num_blocks=6)
    desk.add(8, SamplingParams(max_tokens=5))  # 12 tokens in the cache: a third block
    desk.add(8, SamplingParams(max_tokens=1))
    desk.add(8, SamplingParams(max_tokens=1))
    plan = desk.plan()
    assert [r[0] for r in rows(plan)] == ["r0", "r1"]  # r2 would take r0's third block
    desk.commit(plan)
    assert rows(desk.plan()) == [("r0", 8, 1, True), ("r2", 0, 8, False)]
    assert desk.scheduler.preemption.num_preemptions == 0


def test_admission_leaves_no_block_for_a_sequence_that_ends_within_its_own() -> None:
    """The last token of an output is not read, so it needs no place in a block."""
    desk = Desk(num_blocks=4)
    desk.add(8, SamplingParams(max_tokens=1))
    desk.add(7, SamplingParams(max_tokens=2))
    assert len(desk.plan().rows) == 2


def with_a_held_end(num_blocks: int, num_later: int) -> Desk:
    """Of two equal prompts computed at once, only the first one's blocks are found. That one has
    ended: the end of the other prompt is held, and its beginning is evicted next, before the
    blocks of ``num_later`` later prompts. The next decode takes a block."""
    desk = Desk(num_blocks=num_blocks, max_rows=64)
    desk.add(8, SamplingParams(max_tokens=1), first_token=10)
    [longer] = desk.add(33, SamplingParams(max_tokens=8), first_token=10)
    desk.step()
    for number in range(num_later):
        desk.add(8, SamplingParams(max_tokens=1), first_token=2000 + 1000 * number)
    while longer.num_tokens < 37:
        desk.step()
    return desk


def test_a_prompt_waits_if_a_decode_evicts_the_beginning_that_it_would_share() -> None:
    desk = with_a_held_end(num_blocks=13, num_later=1)
    [equal] = desk.add(33, SamplingParams(max_tokens=1), first_token=10)
    assert rows(desk.plan()) == [("r1", 36, 1, True)], "the tenth block, in place of a cached one"
    assert equal.status is SequenceStatus.WAITING


def test_a_ready_sequence_waits_if_another_evicts_the_beginning_that_it_would_share() -> None:
    desk, params = with_a_held_end(num_blocks=17, num_later=3), SamplingParams(max_tokens=2)
    [other] = desk.add(8, params, first_token=2000, output=(50,))
    [equal] = desk.add(32, params, first_token=10, output=(50,))
    desk.plan()
    assert [s.status for s in (other, equal)] == [SequenceStatus.RUNNING, SequenceStatus.WAITING]


def test_the_first_is_never_sent_away_and_everyone_ends() -> None:
    """More sequences than fit, all growing: rows computed twice stay few."""
    desk = Desk(num_blocks=24, max_rows=64)
    everyone = [desk.add(6, SamplingParams(max_tokens=26))[0] for _ in range(30)]
    computed = 0
    while unfinished := [s for s in everyone if s.status is not SequenceStatus.FINISHED]:
        plan = desk.plan()
        assert plan.rows[0].sequence is unfinished[0]
        computed += plan.num_rows
        desk.commit(plan)
    assert desk.scheduler.preemption.num_preemptions > 10
    assert computed < 1.5 * sum(s.num_tokens - 1 for s in everyone)


def test_abandoned_plan_leaves_everything_as_it_was() -> None:
    desk = Desk()
    (old,) = desk.add(4)
    desk.step()
    (new,) = desk.add(9)
    before = (old.blocks[:], old.num_computed, desk.pool.num_free)
    plan = desk.plan()
    assert old.blocks != before[0]
    desk.scheduler.abandon(plan)
    desk.scheduler.check_integrity()
    assert (old.blocks, old.num_computed, desk.pool.num_free) == before
    assert new.status is SequenceStatus.WAITING
    assert rows(desk.plan()) == rows(plan)


def test_abort_frees_blocks_at_once() -> None:
    desk = Desk()
    running, waiting = desk.add(9)[0], desk.add(9)[0]
    desk.commit(desk.grant(0, 9))
    desk.scheduler.remove(waiting)
    desk.scheduler.remove(running)
    desk.scheduler.remove(running)
    assert desk.pool.num_free == desk.pool.num_blocks
    assert not desk.scheduler.queues.running
    assert len(desk.scheduler.queues.waiting) == 0


@pytest.mark.parametrize(
    ("params", "token", "reason", "stop_id"),
    [
        (SamplingParams(max_tokens=5), EOS, FinishReason.STOP, None),
        (SamplingParams(max_tokens=5, ignore_eos=True), EOS, None, None),
        (SamplingParams(max_tokens=5, stop_token_ids=(50,)), 50, FinishReason.STOP, 50),
        (SamplingParams(max_tokens=5, stop_token_ids=(EOS,)), EOS, FinishReason.STOP, None),
        (SamplingParams(max_tokens=1), 50, FinishReason.LENGTH, None),
        (SamplingParams(max_tokens=5), 50, None, None),
    ],
)
def test_endings(
    params: SamplingParams, token: int, reason: FinishReason | None, stop_id: int | None
) -> None:
    desk = Desk()
    (sequence,) = desk.add(4, params)
    desk.step(token)
    ending = desk.scheduler.ending(sequence)
    assert (ending.reason if ending else None) is reason
    assert (ending.stop_token_id if ending else None) == stop_id
    assert (sequence.status is SequenceStatus.FINISHED) == (reason is not None)


def test_a_sequence_may_end_with_its_last_required_token() -> None:
    desk = Desk()
    (sequence,) = desk.add(4, SamplingParams(max_tokens=9, min_tokens=2))
    assert not desk.step(EOS)
    assert desk.step(EOS) == {sequence: FinishReason.STOP}


def test_context_limit_ends_a_sequence() -> None:
    desk = Desk(max_len=6)
    (sequence,) = desk.add(4, SamplingParams(max_tokens=50))
    desk.step()
    assert desk.step() == {sequence: FinishReason.LENGTH}


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_choices_share_the_full_blocks_of_their_prompt(enable_prefix_caching: bool) -> None:
    desk = Desk(enable_prefix_caching=enable_prefix_caching)
    choices = desk.add(10, n=3)
    first = desk.plan()
    assert len(first.rows) == 1  # the others wait for choice 0
    desk.commit(first)
    second = desk.plan()
    assert rows(second) == [("r0", 10, 1, True), ("r0", 8, 2, False), ("r0", 8, 2, False)]
    desk.commit(second)
    shared = choices[0].blocks[:2]
    assert all(c.blocks[:2] == shared for c in choices)
    assert len({c.blocks[2] for c in choices}) == 3
    assert desk.pool.num_blocks - desk.pool.num_free == 5


def test_the_prompt_of_waiting_choices_counts_once() -> None:
    desk = Desk()
    desk.add(10, n=3)
    assert len(desk.scheduler.queues.waiting) == 3
    assert desk.scheduler.admission.num_deferred == 2
    assert desk.scheduler.queues.num_waiting_tokens == 10


@pytest.mark.parametrize(("prompt_length", "num_computed"), [(8, 4), (9, 8), (12, 8), (13, 12)])
def test_choices_wait_until_all_blocks_that_they_share_are_computed(
    prompt_length: int, num_computed: int
) -> None:
    """Full blocks of the prompt, but one prompt token is left to compute for each choice."""
    desk = Desk()
    desk.add(prompt_length, n=2)
    for _ in range(num_computed // 4):
        assert desk.scheduler.admission.num_deferred == 1
        desk.commit(desk.grant(0, 4))
    assert desk.scheduler.admission.num_deferred == 0


def test_choices_of_a_cached_prompt_need_not_wait() -> None:
    desk = Desk()
    desk.add(9, SamplingParams(max_tokens=1), first_token=10)
    desk.step()
    desk.add(10, first_token=10, n=2)
    assert desk.wanted().prefill_rows == 4
    assert rows(desk.plan()) == [("r1", 8, 2, False), ("r1", 8, 2, False)]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_choices_inherit_the_prompt_of_one_that_ends_at_once(enable_prefix_caching: bool) -> None:
    desk = Desk(max_num_seqs=1, enable_prefix_caching=enable_prefix_caching)
    choices = desk.add(9, SamplingParams(max_tokens=1), n=2)
    assert desk.step() == {choices[0]: FinishReason.LENGTH}
    assert rows(desk.plan()) == [("r0", 8, 1, False)]


def test_resubmitted_output_is_prefilled_with_the_prompt() -> None:
    desk = Desk()
    (sequence,) = desk.add(5, SamplingParams(max_tokens=4), output=(60, 61))
    plan = desk.plan()
    assert rows(plan) == [("r0", 0, 7, False)]
    assert list(sequence.tokens(3, 7)) == [13, 14, 60, 61]
    desk.commit(plan)
    assert desk.step() == {sequence: FinishReason.LENGTH}


def test_a_sequence_that_lacks_one_token_is_admitted_as_a_decode() -> None:
    desk = Desk()
    (old,) = desk.add(6)
    for _ in range(3):
        desk.step()
    (moved,) = desk.add(6, first_token=10, output=tuple(old.output))
    assert desk.wanted() == RowsWanted(decode_rows=2, prefill_rows=0)
    assert rows(desk.grant(1, 0)) == [("r0", 8, 1, True)], "less was granted"
    assert moved.status is SequenceStatus.WAITING
    plan = desk.plan()
    assert rows(plan) == [("r0", 8, 1, True), ("r1", 8, 1, True)]
    desk.scheduler.abandon(plan)
    desk.scheduler.check_integrity()
    assert moved.status is SequenceStatus.WAITING
    desk.add(5)
    plan = desk.plan()
    assert rows(plan) == [("r0", 8, 1, True), ("r1", 8, 1, True), ("r2", 0, 5, False)]
    desk.commit(plan)
    assert moved.output == old.output
    assert moved.num_cached_tokens == 6


def test_a_prompt_that_takes_all_rows_does_not_keep_a_decode_waiting() -> None:
    desk = Desk(max_rows=8)
    (old,) = desk.add(6)
    for _ in range(3):
        desk.step()
    desk.scheduler.remove(old)
    desk.add(40)
    desk.step()
    desk.add(6, first_token=10, output=tuple(old.output))
    assert desk.wanted() == RowsWanted(decode_rows=1, prefill_rows=7)
    assert rows(desk.plan()) == [("r2", 8, 1, True), ("r1", 8, 7, False)]


def test_tokens_of_any_range() -> None:
    desk = Desk()
    (sequence,) = desk.add(3, output=(60, 61, 62))
    known = [10, 11, 12, 60, 61, 62]
    for first in range(7):
        for last in range(first, 7):
            assert list(sequence.tokens(first, last)) == known[first:last]


@pytest.mark.parametrize("seed", range(6))
def test_random_life_ends_with_everything_done_and_free(seed: int) -> None:
    rng = random.Random(seed)
    desk = Desk(num_blocks=12, max_num_seqs=4, max_rows=rng.choice((5, 9, 32)), max_len=40)
    alive: list[SequenceState] = []
    for turn in range(400):
        if turn < 300 and rng.random() < 0.3:
            params = SamplingParams(max_tokens=rng.randint(0, 12))
            alive += desk.add(
                rng.randint(1, 24), params, priority=rng.randint(0, 1), n=rng.choice((1, 1, 3))
            )
        if alive and turn < 300 and rng.random() < 0.1:
            other = rng.choice(alive)  # it comes again with what it has
            first, output = other.request.prompt[0], tuple(other.output)
            params = SamplingParams(max_tokens=len(output) + 2)
            alive += desk.add(other.prompt_length, params, first_token=first, output=output)
        if alive and rng.random() < 0.05:
            desk.scheduler.remove(rng.choice(alive))
        wanted = desk.wanted()
        is_cut = turn < 300 and rng.random() < 0.3
        granted = rng.randint(0, wanted.prefill_rows) if is_cut else wanted.prefill_rows
        plan = desk.grant(wanted.decode_rows, granted)
        desk.scheduler.check_integrity()
        if not is_cut and (wanted.decode_rows or wanted.prefill_rows):
            assert plan.num_rows, "what is wanted can run"
        if rng.random() < 0.2:
            desk.scheduler.abandon(plan)
        else:
            drawn = {
                p.sequence: (50,)
                for p in plan.rows
                if p.samples_token and p.sequence.params.max_tokens
            }
            desk.scheduler.commit(plan, drawn, ())
        desk.scheduler.check_integrity()
    while any(s.status is not SequenceStatus.FINISHED for s in alive):
        assert desk.plan().num_rows
        desk.step()
    assert desk.pool.num_free == desk.pool.num_blocks


def test_a_restriction_is_open_if_it_names_no_request() -> None:
    assert Restriction().is_open
    assert not Restriction(held_requests={"r1"}).is_open
    assert not Restriction(solo_request="r1").is_open
