"""Decode steps that are planned before the step before them is committed."""

from __future__ import annotations

from tests.workers.scheduling.test_scheduler import Desk, rows
from workers.requests.request import SamplingParams
from workers.requests.sequence import SequenceState


def decoding(
    num_blocks: int = 64, max_len: int = 100, max_tokens: int = 8
) -> tuple[Desk, list[SequenceState]]:
    """Two sequences with a token each, of prompts of 3 and 6 tokens; a block has 4."""
    desk = Desk(num_blocks, max_len=max_len)
    params = SamplingParams(max_tokens=max_tokens)
    sequences = [*desk.add(3, params), *desk.add(6, params)]
    desk.step()
    return desk, sequences


def test_the_row_after_an_unknown_token_is_planned_with_its_block() -> None:
    desk, (first, second) = decoding()
    plan = desk.plan()
    ahead = desk.scheduler.ahead.plan(plan, 8)
    assert ahead is not None
    assert rows(plan) == [("r0", 3, 1, True), ("r1", 6, 1, True)]
    assert rows(ahead) == [("r0", 4, 1, True), ("r1", 7, 1, True)]
    assert [planned.num_new_blocks for planned in ahead.rows] == [1, 0]
    desk.commit(plan)
    desk.commit(ahead)
    assert [len(first.output), len(second.output)] == [3, 3]


def test_an_abandoned_step_ahead_leaves_the_step_before_as_it_was() -> None:
    desk, (first, second) = decoding()
    plan = desk.plan()
    blocks = list(first.blocks), list(second.blocks)
    ahead = desk.scheduler.ahead.plan(plan, 8)
    assert ahead is not None
    desk.scheduler.abandon(ahead)
    assert (first.blocks, second.blocks) == blocks
    desk.commit(plan)


def test_sequences_that_have_ended_or_reach_their_length_do_not_continue() -> None:
    desk, (first, second) = decoding(max_tokens=3)
    plan = desk.plan()
    continuing = desk.scheduler.ahead.continuing
    assert continuing(plan) == [first, second]
    desk.scheduler.remove(first)
    assert continuing(plan) == [second]
    assert rows(plan.running) == [("r1", 6, 1, True)]
    desk.commit(plan.running)
    plan = desk.plan()
    assert continuing(plan) == []  # the third token is the last
    assert desk.scheduler.ahead.plan(plan, 8) is None


def test_a_sequence_does_not_continue_beyond_the_context_limit() -> None:
    desk, (first, second) = decoding(max_len=8)
    plan = desk.plan()
    assert desk.scheduler.ahead.continuing(plan) == [first]
    assert second in desk.commit(plan)


def test_nothing_is_planned_without_a_free_block_for_each_row() -> None:
    desk, sequences = decoding(num_blocks=4)
    plan = desk.plan()
    assert desk.pool.num_free < len(sequences)
    assert desk.scheduler.ahead.plan(plan, 8) is None
    desk.scheduler.check_integrity()
