"""Slots of recurrent states: enough for sequences that run, the rest by turns."""

from __future__ import annotations

import pytest

from workers.kv.state_slots import StateMove, StateSlots
from workers.model.state_runs import StateRun
from workers.requests.block_hash import chain_hash, root_hash, state_key

HASHES = [root_hash("s")]
for place in range(5):
    HASHES.append(chain_hash(HASHES[-1], (place,)))
HASHES = HASHES[1:]


def test_rows_are_cut_at_kept_states_and_wherever_a_batch_ends() -> None:
    move = StateMove(first=3, read=9, last=20, write=1, kept=((8, 5), (16, 6)))
    assert list(move.runs(3, 20)) == [
        StateRun(3, 8, 9, 5),
        StateRun(8, 16, 5, 6),
        StateRun(16, 20, 6, 1),
    ]
    assert list(move.runs(3, 10)) == [StateRun(3, 8, 9, 5), StateRun(8, 10, 5, 1)]
    assert list(move.runs(10, 20)) == [StateRun(10, 16, 1, 6), StateRun(16, 20, 6, 1)]
    assert list(move.runs(3, 8)) == [StateRun(3, 8, 9, 5)]
    assert list(move.runs(8, 20)) == [StateRun(8, 16, 5, 6), StateRun(16, 20, 6, 1)]
    assert list(StateMove(7, 2, 8, 3).runs(7, 8)) == [StateRun(7, 8, 2, 3)]


def test_running_sequences_always_get_what_a_step_needs() -> None:
    slots = StateSlots(num_slots=7, max_num_seqs=2)
    extra = [slots.allocate_extra() for _ in range(4)]
    assert extra[3] is None
    held = [slots.allocate() for _ in range(4)]
    assert len({*held, *extra} - {None}) == 7
    assert slots.num_free == 0
    slots.check_integrity(held)
    assert extra[0] is not None
    slots.release_extra(extra[0])
    assert slots.num_free == 1
    slots.check_integrity(held)
    with pytest.raises(AssertionError, match="the holders differ"):
        slots.check_integrity(held[1:])


def test_states_are_found_until_their_slots_are_needed() -> None:
    slots = StateSlots(num_slots=4, max_num_seqs=1)
    for block_hash in HASHES[:3]:
        slot = slots.allocate()
        assert slots.store(slot, block_hash)
        slots.release(slot)
    assert slots.num_known(HASHES) == 3
    assert slots.num_known(HASHES[:2]) == 2
    assert slots.num_known(HASHES[3:]) == 0
    taken = slots.take(HASHES[1])
    assert [slots.allocate() for _ in range(3)]  # evicts all that nobody holds
    assert slots.num_known(HASHES) == 2
    slots.release(taken)


def test_another_slot_with_the_same_state_is_not_found() -> None:
    slots = StateSlots(num_slots=4, max_num_seqs=1)
    first, second = slots.allocate(), slots.allocate()
    assert slots.store(first, HASHES[0])
    assert not slots.store(second, HASHES[0])
    assert slots.take(HASHES[0]) == first


def test_a_replaced_state_stays_where_somebody_found_it() -> None:
    slots = StateSlots(num_slots=6, max_num_seqs=1)
    for block_hash in HASHES[:3]:
        slot = slots.allocate()
        slots.store(slot, block_hash)
        slots.release(slot)
    slots.release(slots.take(HASHES[0]))
    held = slots.hold_extra(HASHES[1])  # a copy is made: that is no use
    for block_hash in HASHES[:3]:
        slots.drop(block_hash)
    assert [slots.num_known([h]) for h in HASHES[:3]] == [1, 0, 0]
    slots.check_integrity([])
    assert held is not None
    slots.release_extra(held)
    slots.forget(HASHES)
    assert slots.num_known(HASHES) == 0
    slots.check_integrity([])


def test_what_another_worker_has_is_evicted_first() -> None:
    slots = StateSlots(num_slots=3, max_num_seqs=1)
    for block_hash in HASHES[:3]:
        slot = slots.allocate()
        slots.store(slot, block_hash)
        slots.release(slot)
    lent = slots.hold_extra(HASHES[2])
    assert lent is not None
    slots.mark_duplicated(lent)
    slots.release_extra(lent)
    assert slots.allocate() == lent
    assert slots.hold_extra(HASHES[2]) is None


def test_a_state_has_a_name_of_its_own() -> None:
    assert state_key(HASHES[0]) != HASHES[0]
    assert state_key(state_key(HASHES[0])) == HASHES[0]
    assert len(state_key(HASHES[0])) == len(HASHES[0])
