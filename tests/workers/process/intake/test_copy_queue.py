"""Copies that wait: tenants take turns, a session waits once, and no more wait than there may."""

from __future__ import annotations

import pytest

from tests.workers.process.intake.test_kv_fetches import identity
from workers.process.intake import copy_queue
from workers.process.intake.copy_queue import MAX_WAITING, CopyQueue, QueuedCopy
from workers.requests.wire import KeepCopy
from workers.transport.peer_link import PeerEndpoint

PEER = PeerEndpoint(name="attention-0", address="nowhere:1", me=identity("attention-1"), token="t")


def copy_of(*blocks: int, tenant: str = "") -> QueuedCopy:
    names = b"".join(block.to_bytes(32, "big") for block in blocks)
    return QueuedCopy(
        KeepCopy(source="attention-0", names=names, num_prompt=1, tenant=tenant), PEER
    )


def drain(queue: CopyQueue) -> list[QueuedCopy]:
    found = []
    while (copy := queue.take()) is not None:
        found.append(copy)
    return found


def test_the_oldest_comes_first() -> None:
    queue, copies = CopyQueue(), [copy_of(1), copy_of(2), copy_of(3)]
    assert [queue.put(copy) for copy in copies] == [0, 0, 0]
    assert len(queue) == 3
    assert drain(queue) == copies
    assert (len(queue), queue.take()) == (0, None)


def test_a_session_waits_once_with_all_its_blocks() -> None:
    queue, other = CopyQueue(), copy_of(7)
    whole = copy_of(1, 2, 3)
    for copy in (copy_of(1, 2), other, whole, copy_of(1)):
        assert queue.put(copy) == 0
    assert drain(queue) == [whole, other]


def test_sequences_that_part_wait_both() -> None:
    queue, copies = CopyQueue(), [copy_of(1, 2), copy_of(1, 3)]
    for copy in copies:
        queue.put(copy)
    assert drain(queue) == copies


def test_tenants_take_turns() -> None:
    queue = CopyQueue()
    many = [copy_of(number, tenant="a") for number in range(3)]
    few = [copy_of(number, tenant="b") for number in range(2)]
    for copy in (*many, *few):
        queue.put(copy)
    assert drain(queue) == [many[0], few[0], many[1], few[1], many[2]]


def test_the_oldest_of_a_tenant_gives_way() -> None:
    queue, other = CopyQueue(), copy_of(1, tenant="b")
    queue.put(other)
    copies = [copy_of(number, tenant="a") for number in range(MAX_WAITING + 2)]
    assert sum(queue.put(copy) for copy in copies) == 2
    assert drain(queue)[:3] == [other, copies[2], copies[3]]


def test_copies_of_too_many_tenants_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_queue, "MAX_TENANTS", 2)
    queue = CopyQueue()
    assert [queue.put(copy_of(1, tenant=t)) for t in ("a", "b", "c", "a")] == [0, 0, 1, 0]
    assert len(queue) == 2
    queue.take()
    assert queue.put(copy_of(1, tenant="c")) == 0
