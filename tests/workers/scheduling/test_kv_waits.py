"""Requests whose blocks may come from elsewhere: asked about when they could run, and held."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.workers.kv.transfer.test_store import engine_of, request_of
from tests.workers.scheduling.test_scheduler import Desk, rows
from workers.requests.block_hash import block_hashes
from workers.requests.request import SamplingParams
from workers.requests.sequence import SequenceStatus

LONG = SamplingParams(max_tokens=12, ignore_eos=True)


def asked(desk: Desk) -> list[str]:
    return [sequence.request.request_id for sequence in desk.take_admissible(9)]


def test_a_request_is_asked_about_once() -> None:
    desk = Desk()
    desk.add(5)
    desk.add(5, n=3)
    assert asked(desk) == ["r0", "r1"]
    assert asked(desk) == []
    desk.step()
    desk.add(5)
    assert asked(desk) == ["r2"]


def test_a_request_without_room_is_not_asked_about() -> None:
    desk = Desk(max_num_seqs=1)
    desk.add(5, LONG)
    (second,) = desk.add(5)
    assert asked(desk) == ["r0"]
    desk.step()
    assert asked(desk) == []
    desk.scheduler.remove(desk.scheduler.queues.running[0])
    assert desk.take_admissible(9) == [second]


def test_a_request_that_needs_a_preemption_gets_its_blocks_before_it_is_asked_about() -> None:
    desk = Desk(num_blocks=6)
    (low,) = desk.add(15, LONG, priority=1)
    assert asked(desk) == ["r0"]
    desk.step()
    (high,) = desk.add(15, LONG)
    assert asked(desk) == ["r1"]
    assert low.status is SequenceStatus.WAITING
    desk.scheduler.kv_waits.begin("r1", 2)
    held = desk.pool.allocate(2)
    assert desk.wanted().prefill_rows == 0, "the blocks that it lacks are left for it"
    desk.pool.release(held)
    desk.scheduler.kv_waits.end("r1")
    assert [row[0] for row in rows(desk.plan())] == ["r1"]
    assert desk.scheduler.preemption.take_preempted() == [low]
    assert desk.scheduler.preemption.take_preempted() == []
    assert high.status is SequenceStatus.RUNNING


def test_a_request_that_was_asked_about_preempts_in_the_plan_alone() -> None:
    desk = Desk(num_blocks=6)
    (low,) = desk.add(15, LONG, priority=1)
    desk.step()
    desk.add(15, LONG)
    desk.scheduler.kv_waits.take_untried(["r1"], 1)
    assert asked(desk) == []
    assert low.status is SequenceStatus.RUNNING
    assert [row[0] for row in rows(desk.plan())] == ["r1"]


def test_a_preempted_request_is_asked_about_anew() -> None:
    desk = Desk(num_blocks=6)
    desk.add(7, LONG)
    (second,) = desk.add(7, LONG)
    assert asked(desk) == ["r0", "r1"]
    while second.status is not SequenceStatus.WAITING or not second.output:
        desk.step()
    assert desk.scheduler.preemption.num_preemptions == 1
    while not (found := asked(desk)):
        desk.step()
    assert found == ["r1"]


def test_others_run_while_one_waits_for_blocks() -> None:
    desk = Desk()
    (first,) = desk.add(5)
    (second,) = desk.add(5)
    desk.scheduler.kv_waits.begin("r0", 0)
    assert desk.scheduler.admission.num_waiting_for_kv == 1
    desk.step()
    assert (first.status, second.status) == (SequenceStatus.WAITING, SequenceStatus.RUNNING)
    desk.scheduler.kv_waits.end("r0")
    desk.step()
    assert first.status is SequenceStatus.RUNNING
    assert desk.scheduler.admission.num_waiting_for_kv == 0


def test_one_that_waits_for_blocks_keeps_its_seat_and_its_blocks() -> None:
    desk = Desk(max_num_seqs=1)
    desk.add(5)
    (second,) = desk.add(5)
    assert asked(desk) == ["r0"]
    desk.scheduler.kv_waits.begin("r0", 2)
    assert asked(desk) == []
    assert not desk.plan().rows
    desk.scheduler.kv_waits.end("r0")
    assert [row[0] for row in rows(desk.plan())] == ["r0"]
    assert second.status is SequenceStatus.WAITING


@pytest.mark.parametrize(
    ("num_blocks", "admissible", "num_rows", "num_rows_after"),
    [(6, ["r0"], 0, 15), (8, ["r0", "r1"], 7, 22)],
)
def test_others_leave_the_blocks_that_one_needs_beside_those_that_come(
    num_blocks: int, admissible: list[str], num_rows: int, num_rows_after: int
) -> None:
    """r0 needs four and one to grow, r1 two and one."""
    desk = Desk(num_blocks=num_blocks)
    desk.add(15)
    desk.add(7)
    assert asked(desk) == admissible
    held = desk.pool.allocate(3)
    desk.scheduler.kv_waits.begin("r0", 3)
    assert desk.wanted().prefill_rows == num_rows
    desk.pool.release(held)
    desk.scheduler.kv_waits.end("r0")
    assert desk.wanted().prefill_rows == num_rows_after


def test_as_many_are_taken_as_are_wanted() -> None:
    desk = Desk()
    for _ in range(3):
        desk.add(5)
    found = desk.take_admissible(2)
    assert [s.request.request_id for s in found] == ["r0", "r1"]
    assert asked(desk) == ["r2"]


def test_a_request_with_many_choices_waits_as_one() -> None:
    desk = Desk()
    desk.add(9, n=3)
    desk.scheduler.kv_waits.begin("r0", 0)
    assert desk.scheduler.admission.num_waiting_for_kv == 1
    assert desk.scheduler.admission.num_deferred == 2
    assert not desk.plan().rows


def test_an_engine_forgets_a_request_that_has_ended(tiny_checkpoint: Path) -> None:
    engine = engine_of(tiny_checkpoint).engine
    request = request_of()
    engine.add_request(request)
    ((found, hashes),) = engine.take_admissible(9)
    assert (found, list(hashes)) == (request, block_hashes(request, 16, None))
    engine.wait_for_kv("r", 0)
    assert engine.rows_wanted().prefill_rows == 0
    assert engine.stats()['num_requests_waiting_by_reason{reason="kv"}'] == 1
    assert engine.stats()['num_requests_waiting_by_reason{reason="capacity"}'] == 0
    engine.abort("r")
    engine.add_request(replace(request, attempt=1))
    assert len(engine.take_admissible(9)) == 1
    assert engine.rows_wanted().prefill_rows == len(request.prompt)
    engine.end_kv_wait("unknown")
