"""What sequences find of each other's blocks: by tokens and salt, committed ones only, exact."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from tests.workers.kv.hashes import hashes_of
from tests.workers.scheduling.test_scheduler import Desk, rows
from workers.kv.turns import TurnUse
from workers.requests.request import FinishReason, SamplingParams
from workers.requests.sequence import SequenceState, SequenceStatus

ONE = SamplingParams(max_tokens=1)


class Listener:
    """Writes down what sequences leave."""

    def __init__(self) -> None:
        self.prompts: list[TurnUse] = []
        self.turns: list[TurnUse] = []
        self.num_stopped = 0

    def prompt_done(self, sequence: SequenceState, use: TurnUse) -> None:
        assert len(sequence.blocks) >= len(use.names), "it holds them"
        self.prompts.append(use)

    def ended(self, sequence: SequenceState, use: TurnUse) -> None:
        self.turns.append(use)

    def stopped(self, sequence: SequenceState) -> None:
        self.num_stopped += 1


def served(desk: Desk, prompt_length: int, **more: object) -> list[tuple[str, int, int, bool]]:
    """Run a request of one token to its end; the rows of its first step."""
    (sequence,) = desk.add(prompt_length, ONE, **more)  # type: ignore[arg-type]
    plan = desk.plan()
    found = rows(plan)
    assert desk.commit(plan)[sequence] is FinishReason.LENGTH
    return found


def test_full_blocks_of_the_same_beginning_are_found() -> None:
    desk = Desk()
    assert served(desk, 11, first_token=100) == [("r0", 0, 11, False)]
    assert served(desk, 30, first_token=100) == [("r1", 8, 22, False)]
    assert served(desk, 30, first_token=101) == [("r2", 0, 30, False)]
    assert served(desk, 26, first_token=100) == [("r3", 24, 2, False)]
    assert desk.pool.num_free == desk.pool.num_blocks


def test_the_last_prompt_token_is_always_computed() -> None:
    desk = Desk()
    served(desk, 12, first_token=100)
    assert served(desk, 12, first_token=100) == [("r1", 8, 4, False)]
    assert served(desk, 13, first_token=100) == [("r2", 12, 1, False)]


def test_salts_keep_tenants_apart() -> None:
    desk = Desk()
    served(desk, 9, first_token=100, cache_salt="a")
    assert served(desk, 9, first_token=100) == [("r1", 0, 9, False)]
    assert served(desk, 9, first_token=100, cache_salt="b") == [("r2", 0, 9, False)]
    assert served(desk, 9, first_token=100, cache_salt="a") == [("r3", 8, 1, False)]


def test_long_prompts_share_with_their_like_where_the_length_matters() -> None:
    desk = Desk(length_matters_above=20)
    served(desk, 20, first_token=100)
    assert served(desk, 18, first_token=100) == [("r1", 16, 2, False)]
    assert served(desk, 21, first_token=100) == [("r2", 0, 21, False)]
    assert served(desk, 22, first_token=100) == [("r3", 0, 22, False)]
    assert served(desk, 22, first_token=100) == [("r4", 20, 2, False)]
    assert served(desk, 20, first_token=100) == [("r5", 16, 4, False)]


def test_output_is_found_as_well_as_prompts() -> None:
    desk = Desk()
    (first,) = desk.add(6, SamplingParams(max_tokens=8), first_token=100)
    for token in range(106, 114):
        desk.step(token)
    assert first.status is SequenceStatus.FINISHED
    # 13 of its 14 tokens were computed: three full blocks
    assert served(desk, 20, first_token=100) == [("r1", 12, 8, False)]


def test_nothing_is_found_before_its_step_is_committed() -> None:
    desk = Desk()
    desk.add(9, ONE, first_token=100)
    desk.add(9, ONE, first_token=100)
    for _ in range(2):
        plan = desk.plan()
        assert rows(plan) == [("r0", 0, 9, False), ("r1", 0, 9, False)]
        assert len(hashes_of(desk.pool)) == 0
        desk.scheduler.abandon(plan)
        assert len(hashes_of(desk.pool)) == 0


def test_the_same_prefix_computed_twice_at_once_is_kept_once() -> None:
    desk = Desk(num_blocks=8)
    (first,) = desk.add(9, SamplingParams(max_tokens=2), first_token=100)
    desk.add(9, SamplingParams(max_tokens=3), first_token=100)
    desk.step()
    kept = first.blocks[:2]
    assert len(hashes_of(desk.pool)) == 2
    desk.step()
    assert first.status is SequenceStatus.FINISHED
    (third,) = desk.add(9, SamplingParams(max_tokens=2), first_token=100)
    assert rows(desk.plan())[1:] == [("r2", 8, 1, False)]
    assert third.blocks[:2] == kept


def test_a_sequence_tells_at_its_end_what_it_leaves() -> None:
    desk, left = Desk(), Listener()
    desk.scheduler.prefixes.listener = left
    for adapter in ("", "a@1"):
        (sequence,) = desk.add(11, ONE, first_token=100)
        sequence.request = replace(sequence.request, session="s", adapter=adapter)
        plan = desk.plan()
        assert not left.turns or adapter
        desk.commit(plan)
    plain, adapted = left.turns
    assert {*plain.names, *adapted.names} == hashes_of(desk.pool)
    assert (len(plain.names), plain.num_prompt, plain.states) == (2, 2, [])
    assert (plain.hints.session, plain.may_outlive) == ("s", True)
    assert (len(adapted.names), adapted.may_outlive) == (2, False)
    assert not {*plain.names} & {*adapted.names}


def test_the_pool_keeps_what_a_sequence_asks_to_keep_once_it_has_ended() -> None:
    desk = Desk(max_kept=8)
    (sequence,) = desk.add(11, ONE, first_token=100)
    sequence.request = replace(sequence.request, cache_ttl_s=60.0)
    desk.step()
    assert sequence.status is SequenceStatus.FINISHED
    assert desk.pool.num_kept == 2


def test_a_sequence_tells_once_when_its_prompt_is_computed() -> None:
    desk, left = Desk(max_rows=6), Listener()
    desk.scheduler.prefixes.listener = left
    desk.add(11, SamplingParams(max_tokens=8), first_token=100)
    desk.step()
    assert not left.prompts
    desk.step()
    (prompt,) = left.prompts
    assert (len(prompt.names), prompt.num_prompt) == (2, 2)
    while not left.turns:
        desk.step()
    assert left.prompts == [prompt]
    assert left.turns[0].names[:2] == prompt.names
    assert len(left.turns[0].names) == 4
    served(desk, 11, first_token=100)
    assert left.prompts == [prompt], "it was known"


def test_a_preempted_sequence_tells_that_it_stops() -> None:
    desk, left = Desk(num_blocks=6), Listener()
    desk.scheduler.prefixes.listener = left
    desk.add(7, SamplingParams(max_tokens=12))
    desk.add(7, SamplingParams(max_tokens=12))
    while not left.num_stopped:
        desk.step()
    assert desk.scheduler.preemption.num_preemptions == 1
    assert not left.turns


def test_what_an_abandoned_plan_found_is_given_back() -> None:
    desk = Desk()
    served(desk, 9, first_token=100)
    (again,) = desk.add(12, ONE, first_token=100)
    before = (desk.wanted(), desk.pool.num_free, len(hashes_of(desk.pool)))
    plan = desk.plan()
    assert desk.pool.num_free < before[1]
    desk.scheduler.abandon(plan)
    desk.scheduler.check_integrity()
    assert (desk.wanted(), desk.pool.num_free, len(hashes_of(desk.pool))) == before
    assert desk.scheduler.prefixes.num_hit_tokens == 0
    assert rows(desk.plan()) == rows(plan) == [("r1", 8, 4, False)]
    assert again.num_cached_tokens is None


def test_a_chunked_prompt_is_found_as_far_as_it_came() -> None:
    desk = Desk(max_rows=8)
    (aborted,) = desk.add(30, first_token=100)
    desk.step()
    desk.step()
    desk.scheduler.remove(aborted)
    assert served(desk, 24, first_token=100) == [("r1", 16, 8, False)]


def test_what_a_failed_step_of_a_sequence_computed_is_not_found() -> None:
    desk = Desk(max_rows=8)
    (failed,) = desk.add(20, first_token=100)
    desk.step()
    endings = desk.scheduler.commit(desk.plan(), {}, [failed])
    assert endings[failed].reason is FinishReason.ERROR
    desk.scheduler.check_integrity()
    desk.add(20, ONE, first_token=100)
    assert rows(desk.plan()) == [("r1", 8, 8, False)]


@pytest.mark.parametrize(("max_tokens", "kept"), [(5, 12), (6, 8)])
def test_a_sequence_that_gave_way_resumes_from_its_blocks(max_tokens: int, kept: int) -> None:
    """Output blocks too; with one more token the older sequence takes the last of them."""
    desk = Desk(num_blocks=6)
    (older,) = desk.add(8, SamplingParams(max_tokens=max_tokens))
    (newest,) = desk.add(11, SamplingParams(max_tokens=4))
    while older.status is SequenceStatus.RUNNING or not desk.scheduler.preemption.num_preemptions:
        desk.step(60 + len(older.output))
    assert newest.output == [60, 61]
    assert rows(desk.plan()) == [("r1", kept, 13 - kept, kept == 12)]
    prefixes = desk.scheduler.prefixes
    assert (prefixes.num_queried_tokens, prefixes.num_hit_tokens) == (19, 0)  # first admissions


def test_hits_are_counted_in_tokens() -> None:
    desk = Desk()
    served(desk, 9, first_token=100)
    choices = desk.add(9, ONE, first_token=100, n=3)
    desk.step()
    prefixes = desk.scheduler.prefixes
    assert (prefixes.num_queried_tokens, prefixes.num_hit_tokens) == (36, 24)
    assert prefixes.num_cached_prompt_tokens == 8  # a request's prompt counts once
    assert [c.num_cached_tokens for c in choices] == [8, 8, 8]


def test_choices_of_a_known_prompt_need_not_wait_for_the_first() -> None:
    desk = Desk()
    served(desk, 9, first_token=100)
    desk.add(9, first_token=100, n=3)
    assert rows(desk.plan()) == [("r1", 8, 1, False)] * 3


def test_a_request_that_scores_its_prompt_computes_all_of_it() -> None:
    desk = Desk()
    served(desk, 9, first_token=100)
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0)
    desk.add(9, scoring, first_token=100, n=2)
    assert rows(desk.plan()) == [("r1", 0, 9, False), ("r1", 8, 1, False)]
    desk.add(9, scoring, first_token=100, output=(60,))  # scored by an earlier attempt
    assert rows(desk.plan())[-1] == ("r2", 8, 2, False)


def test_switched_off_nothing_is_shared_between_requests() -> None:
    desk = Desk(enable_prefix_caching=False)
    served(desk, 9, first_token=100)
    assert served(desk, 9, first_token=100) == [("r1", 0, 9, False)]
    assert len(hashes_of(desk.pool)) == 0
    choices = desk.add(9, first_token=100, n=2)
    assert rows(desk.plan()) == [("r2", 0, 9, False)]
    desk.step()
    assert rows(desk.plan()) == [("r2", 9, 1, True), ("r2", 8, 1, False)]
    desk.step()
    desk.scheduler.remove(choices[0])
    desk.scheduler.remove(choices[1])
    assert served(desk, 9, first_token=100) == [("r3", 0, 9, False)]
    prefixes = desk.scheduler.prefixes
    assert prefixes.num_queried_tokens == prefixes.num_hit_tokens == 0
    assert prefixes.num_cached_prompt_tokens == 0


def test_switched_off_choices_share_their_prompt_but_no_output() -> None:
    desk = Desk(enable_prefix_caching=False)
    desk.add(9, SamplingParams(max_tokens=8), first_token=100, n=2)
    for _ in range(6):
        desk.step()
    assert len(hashes_of(desk.pool)) == 2


def test_a_choice_that_starts_late_has_the_hashes_of_its_own_output() -> None:
    desk = Desk(max_num_seqs=1)
    choices = desk.add(4, SamplingParams(max_tokens=5), first_token=100, n=2)
    for choice, token in zip(choices, (60, 70), strict=True):
        while choice.status is not SequenceStatus.FINISHED:
            desk.step(token)
    for number, token in enumerate((60, 70), 1):
        (again,) = desk.add(4, first_token=100, output=(*[token] * 4, 1))
        assert rows(desk.plan()) == [(f"r{number}", 8, 1, True)]
        desk.scheduler.remove(again)


def test_a_block_is_linked_to_the_one_before_it() -> None:
    """So a beginning that was lent does not go before the end that builds on it."""
    desk = Desk(num_blocks=5)
    (sequence,) = desk.add(17, ONE)
    plan = desk.plan()
    blocks = list(sequence.blocks)
    desk.commit(plan)
    desk.pool.mark_duplicated(blocks[:3])
    assert desk.pool.allocate(5) == blocks[::-1]


@pytest.mark.parametrize("seed", range(8))
def test_random_life_on_few_prefixes_keeps_accounts(seed: int) -> None:
    """Admit, chunk, preempt, fail, abandon and abort; what is found is checked after each step."""
    rng = random.Random(seed)
    desk = Desk(
        num_blocks=rng.choice((10, 16)), max_num_seqs=5, max_rows=rng.choice((6, 32)), max_len=40
    )
    alive: list[SequenceState] = []
    for _ in range(500):
        if rng.random() < 0.4:
            params = SamplingParams(
                max_tokens=rng.randint(0, 12), prompt_logprobs=rng.choice((None, None, 1))
            )
            alive += desk.add(
                rng.randint(1, 24),
                params,
                first_token=rng.choice((100, 200)),
                cache_salt=rng.choice(("", "", "a")),
                n=rng.choice((1, 1, 3)),
                priority=rng.randint(0, 1),
            )
        if alive and rng.random() < 0.1:
            desk.scheduler.remove(rng.choice(alive))
        plan = desk.plan()
        if rng.random() < 0.2:
            desk.scheduler.abandon(plan)
        else:
            failed = [p.sequence for p in plan.rows if rng.random() < 0.03]
            drawn = {
                p.sequence: (50,)
                for p in plan.rows
                if p.samples_token and p.sequence.params.max_tokens and p.sequence not in failed
            }
            desk.scheduler.commit(plan, drawn, failed)
        desk.scheduler.check_integrity()
    prefixes = desk.scheduler.prefixes
    assert 0 < prefixes.num_hit_tokens < prefixes.num_queried_tokens
    assert desk.scheduler.preemption.num_preemptions
    for sequence in alive:
        desk.scheduler.remove(sequence)
    desk.scheduler.check_integrity()
    assert desk.pool.num_free == desk.pool.num_blocks
