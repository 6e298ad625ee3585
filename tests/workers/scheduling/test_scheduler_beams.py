"""The scheduler alone: forks of sequences, and idle ones."""

from __future__ import annotations

import dataclasses

import pytest

from tests.workers.scheduling.test_scheduler import Desk, rows
from workers.requests.request import BeamParams, SamplingParams
from workers.requests.sequence import SequenceState, SequenceStatus

SEARCH = SamplingParams(max_tokens=20, temperature=0.0, beams=BeamParams())


def computed(desk: Desk, prompt_length: int) -> SequenceState:
    """A search whose prompt is computed: its one beam is idle."""
    (sequence,) = desk.add(prompt_length, SEARCH)
    desk.scheduler.commit(desk.plan(), {}, ())
    sequence.is_idle = True
    return sequence


def child_of(parent: SequenceState, token: int = 60) -> SequenceState:
    """Both go on, with different tokens."""
    child = dataclasses.replace(
        parent,
        choice=parent.choice + 1,
        output=list(parent.output),
        num_computed=0,
        blocks=[],
        seat=None,
        first_choice=parent,
        block_hashes=list(parent.block_hashes),
    )
    child.append(token)
    parent.append(token + 1)
    return child


def test_a_fork_shares_full_blocks_and_has_a_copy_of_the_last_one() -> None:
    desk = Desk()
    parent = computed(desk, 6)
    child = child_of(parent)
    copied = desk.scheduler.fork(parent, child)
    assert copied == (parent.blocks[1], child.blocks[1])
    assert child.blocks[0] == parent.blocks[0]
    assert child.blocks[1] != parent.blocks[1]
    assert (child.status, child.num_computed) == (SequenceStatus.RUNNING, 6)
    assert rows(desk.plan()) == [("r0", 6, 1, True)] * 2
    desk.scheduler.remove(parent)
    desk.scheduler.remove(child)
    assert desk.pool.num_free == desk.pool.num_blocks


def test_a_fork_between_blocks_copies_nothing() -> None:
    desk = Desk()
    parent = computed(desk, 8)
    child = child_of(parent)
    assert desk.scheduler.fork(parent, child) is None
    assert child.blocks == parent.blocks
    desk.step()
    assert [len(s.blocks) for s in (parent, child)] == [3, 3]
    assert parent.blocks[2] != child.blocks[2]


@pytest.mark.parametrize("has_cache", [True, False])
def test_a_fork_without_a_seat_waits_and_goes_on_from_what_is_cached(has_cache: bool) -> None:
    desk = Desk(max_num_seqs=1, enable_prefix_caching=has_cache)
    parent = computed(desk, 10)
    child = child_of(parent)
    assert desk.scheduler.fork(parent, child) is None
    assert (child.status, child.blocks) == (SequenceStatus.WAITING, [])
    desk.scheduler.remove(parent)
    first = 8 if has_cache else 0
    assert rows(desk.plan()) == [("r0", first, 11 - first, False)]


@pytest.mark.parametrize(("num_blocks", "runs"), [(4, False), (5, True)])
def test_a_fork_leaves_blocks_for_others_to_grow(num_blocks: int, runs: bool) -> None:
    """Two are held; one is to be copied, and each of both may need one more."""
    desk = Desk(num_blocks=num_blocks)
    parent = computed(desk, 6)
    child = child_of(parent)
    assert (desk.scheduler.fork(parent, child) is not None) is runs
    assert (child.status is SequenceStatus.RUNNING) is runs


def test_a_fork_of_a_preempted_sequence_waits_for_its_prompt() -> None:
    desk = Desk(max_rows=8)
    parent = computed(desk, 6)
    desk.scheduler.preemption.preempt(parent)
    desk.pool.forget(range(desk.pool.num_blocks))
    child = child_of(parent)
    assert desk.scheduler.fork(parent, child) is None
    assert child.status is SequenceStatus.WAITING
    assert rows(desk.plan()) == [("r0", 0, 7, False)]  # the parent alone, one row is left


def test_an_idle_sequence_runs_no_rows() -> None:
    desk = Desk()
    sequence = computed(desk, 6)
    wanted = desk.wanted()
    assert (wanted.decode_rows, wanted.prefill_rows) == (0, 0)
    assert not desk.plan().rows
    desk.scheduler.preemption.preempt(sequence)
    assert not desk.plan().rows
    sequence.append(60)
    assert rows(desk.plan()) == [("r0", 4, 3, False)]


def test_an_idle_first_choice_is_not_waited_for() -> None:
    desk = Desk()
    parent = computed(desk, 10)
    child = child_of(parent)
    desk.scheduler.preemption.preempt(parent)
    parent.is_idle = True
    desk.scheduler.fork(parent, child)
    assert [p.sequence for p in desk.plan().rows] == [child]


def test_an_idle_sequence_gives_way_to_a_waiting_one() -> None:
    desk = Desk(num_blocks=6)
    idle = computed(desk, 8)
    (running,) = desk.add(4, SamplingParams(max_tokens=1))
    desk.step()
    assert running.status is SequenceStatus.FINISHED
    (waiting,) = desk.add(16, SamplingParams(max_tokens=2))
    plan = desk.plan()
    assert [p.sequence for p in plan.rows] == [waiting]
    assert desk.scheduler.preemption.preempted == [idle]
    assert idle.is_idle


def test_it_does_not_give_way_without_need() -> None:
    desk = Desk(num_blocks=12)
    idle = computed(desk, 8)
    (waiting,) = desk.add(16, SamplingParams(max_tokens=2))
    assert [p.sequence for p in desk.plan().rows] == [waiting]
    assert idle.status is SequenceStatus.RUNNING


def test_it_keeps_its_blocks_where_they_do_not_suffice() -> None:
    desk = Desk(num_blocks=9)
    idle = computed(desk, 8)
    (running,) = desk.add(12, SamplingParams(max_tokens=20))
    desk.step()
    (waiting,) = desk.add(24, SamplingParams(max_tokens=2))
    assert waiting not in [p.sequence for p in desk.plan().rows]
    assert idle.status is running.status is SequenceStatus.RUNNING


def test_decodes_that_grow_preempt_idle_sequences_first() -> None:
    desk = Desk(num_blocks=5)
    idle = computed(desk, 8)
    (sequence,) = desk.add(4, SamplingParams(max_tokens=16))
    while sequence.status is not SequenceStatus.FINISHED:
        desk.step()
        assert sequence not in desk.scheduler.preemption.preempted
    assert desk.scheduler.preemption.num_preemptions == 1
    assert idle.status is SequenceStatus.WAITING
