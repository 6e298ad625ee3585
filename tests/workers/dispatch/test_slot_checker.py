"""The check and the count of slots: on a CPU at once, on a GPU with one wait at a step's end."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch

from benchmarks.harness.mesh import make_bank
from cluster.core.placement import FREE_SLOT
from tests.harness.pretend_gpu import DEVICE, pretend_gpu
from workers.dispatch.device_slots import DeviceSlotChecker, make_slot_checker
from workers.dispatch.expert_counters import ExpertCounters, ReceivedRows
from workers.dispatch.slot_checker import (
    FilledSlots,
    SlotChecker,
    joined,
    merge_adjacent,
)
from workers.transport.transport import ExpectedMessage, PartShape, empty_messages

EXPERTS = [5, FREE_SLOT, 3, 0]
RANKS = (4, 7)
BANK = make_bank(0)


class RejectedError(Exception):
    """An edge was closed."""


def reject(rank: int, reason: str) -> NoReturn:
    raise RejectedError(f"{rank}: {reason}")


class Served:
    """Steps of exchanges of one bank: [exchange][rank][row][k]."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.counters = ExpertCounters()
        self.counters.resize([4])
        self.checker: SlotChecker = make_slot_checker(self.counters, [BANK], self.device)

    def run(self, exchanges: list[list[list[list[int]]]]) -> list[list[int]]:
        """The counts after a step."""
        filled = FilledSlots.of(0, EXPERTS, self.device)
        self.checker.begin()
        for received in exchanges:
            slots = [torch.tensor(rows, device=self.device, dtype=torch.int32) for rows in received]
            used = self.checker.check(filled, RANKS, slots, reject)
            num_rows = sum(map(len, slots))
            rows = ReceivedRows(BANK.exchanges[0], num_rows, num_rows, by_pair=False)
            self.checker.count(filled, used.slots, rows)
            self.checker.flush()
        self.checker.end(reject)
        return [own.tolist() for own in self.counters.token_counts]


STEP = [[[[0, 2], [3, -1]], [[-1, -1]]], [[[2, 2]], [[0, -1], [3, 0]]]]


def test_a_gpu_counts_what_a_cpu_counts_and_waits_once() -> None:
    expected = Served().run(STEP)
    assert expected == [[3, 0, 3, 2]]
    with pretend_gpu() as log:
        served = Served(DEVICE)
        before = sum(log.waits.values())
        found = served.run(STEP)
        # Those of the test: tables and slots that it makes on the device.
        assert log.waits["copy from the device"] == 1, "counts and checks come together"
        assert set(log.waits) <= {"copy from the device", "copy to the device"}
        assert before == 0
        assert served.run(STEP) == [[2 * n for n in expected[0]]]
    assert found == expected
    padding = served.counters.padding
    assert padding.ratio("dispatch") == padding.ratio("combine") == pytest.approx(1 / 6)


@pytest.mark.parametrize("slot", [1, 4, -2, 2**31 - 1])
def test_a_slot_without_an_expert_is_named(slot: int) -> None:
    step = [*STEP, [[[0, 2]], [[3, slot]]]]
    message = f"7: no expert in slot {slot} of bank 0"
    with pytest.raises(RejectedError) as on_cpu:
        Served().run(step)
    with pretend_gpu(), pytest.raises(RejectedError) as on_gpu:
        Served(DEVICE).run(step)
    assert str(on_cpu.value) == str(on_gpu.value) == message


def test_rows_go_on_without_a_slot_that_has_no_expert() -> None:
    with pretend_gpu():
        served = Served(DEVICE)
        slots = torch.tensor([[0, 1], [9, 3]], device=DEVICE)
        filled = FilledSlots.of(0, EXPERTS, served.device)
        used = served.checker.check(filled, RANKS[:1], [slots], reject)
        assert used.slots.tolist() == [[0, -1], [-1, 3]]


def test_what_a_broken_step_left_is_dropped() -> None:
    with pretend_gpu():
        served = Served(DEVICE)
        filled = FilledSlots.of(0, EXPERTS, served.device)
        slots = torch.tensor([[1, 1]], device=DEVICE)
        served.checker.check(filled, RANKS[:1], [slots], reject)
        assert served.run(STEP) == [[3, 0, 3, 2]], "it neither counts nor raises"


def test_a_step_that_was_captured_before_slots_were_added_counts_its_slots() -> None:
    with pretend_gpu():
        served = Served(DEVICE)
        checker = served.checker
        assert isinstance(checker, DeviceSlotChecker)
        filled = FilledSlots.of(0, EXPERTS, served.device)
        slots = torch.tensor([[0, 3]], device=DEVICE)
        checker.count(
            filled,
            checker.check(filled, RANKS[:1], [slots], reject).slots,
            ReceivedRows(BANK.exchanges[0], 1, 1, by_pair=False),
        )
        served.counters.resize([6])
        checker.end(reject)
    assert [own.tolist() for own in served.counters.token_counts] == [[1, 0, 0, 1, 0, 0]]


def received(*counts: int) -> list[torch.Tensor]:
    """Metas [rows, 6] of some ranks, as a transport receives them: numbers in order."""
    part = PartShape(6, torch.int32)
    expected = [ExpectedMessage(rank, (part,), (n,)) for rank, n in enumerate(counts)]
    metas = [parts[0] for parts in empty_messages(expected, torch.device("cpu"))]
    first = 0
    for meta in metas:
        meta.copy_(torch.arange(first, first + meta.numel()).view(meta.shape))
        first += meta.numel()
    return metas


@pytest.mark.parametrize("counts", [(3,), (3, 2), (2, 0, 1), (0, 2), (0, 0)])
def test_rows_of_all_ranks_are_joined_without_a_copy(counts: tuple[int, ...]) -> None:
    metas = received(*counts)
    for parts in (metas, [m[:, :3] for m in metas], [m[:, 3:].view(torch.float32) for m in metas]):
        (whole,) = merge_adjacent(parts)
        assert torch.equal(whole, torch.cat(parts))
        assert whole.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("order", [[1, 0], [0, 2], [0, 1, 3]])
def test_rows_that_are_not_adjacent_are_copied(order: list[int]) -> None:
    metas = received(2, 2, 2)
    metas.append(metas[2].clone())
    parts = [metas[i] for i in order]
    assert merge_adjacent(parts) is parts
    assert torch.equal(joined(parts), torch.cat(parts))


def test_messages_have_the_numbers_of_rows_that_are_given() -> None:
    parts = (PartShape(2, torch.int32), PartShape(3, torch.float32))
    expected = [ExpectedMessage(rank, parts, (9, 9)) for rank in range(2)]
    found = empty_messages(expected, torch.device("cpu"), [(1, 2), (0, 4)])
    assert [[tuple(part.shape) for part in message] for message in found] == [
        [(1, 2), (2, 3)],
        [(0, 2), (4, 3)],
    ]
    assert empty_messages([], torch.device("cpu")) == []
