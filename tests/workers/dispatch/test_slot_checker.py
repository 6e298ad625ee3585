"""The check and the count of slots: on a CPU at once, on a GPU with one wait at a step's end."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch

from cluster.core.placement import FREE_SLOT
from tests.harness.pretend_gpu import DEVICE, pretend_gpu
from workers.dispatch.slot_checker import (
    DeviceSlotChecker,
    FilledSlots,
    HostSlotChecker,
    SlotChecker,
    make_slot_checker,
)

EXPERTS = [5, FREE_SLOT, 3, 0]
RANKS = (4, 7)


class RejectedError(Exception):
    """An edge was closed."""


def reject(rank: int, reason: str) -> NoReturn:
    raise RejectedError(f"{rank}: {reason}")


def run(checker: SlotChecker, exchanges: list[list[list[list[int]]]]) -> list[list[int]]:
    """The counts after a step of exchanges of one bank: [exchange][rank][row][k]."""
    device = torch.device("cpu" if isinstance(checker, HostSlotChecker) else DEVICE)
    filled, counts = FilledSlots.of(0, EXPERTS, device), [torch.zeros(4, dtype=torch.int64)]
    checker.begin(counts)
    for received in exchanges:
        slots = [torch.tensor(rows, device=device) for rows in received]
        used = checker.check(filled, RANKS, slots, reject)
        checker.count(filled, used.slots)
        checker.flush(counts)
    checker.end(counts, reject)
    return [own.tolist() for own in counts]


STEP = [[[[0, 2], [3, -1]], [[-1, -1]]], [[[2, 2]], [[0, -1], [3, 0]]]]


def test_a_gpu_counts_what_a_cpu_counts_and_waits_once() -> None:
    expected = run(HostSlotChecker(), STEP)
    assert expected == [[3, 0, 3, 2]]
    with pretend_gpu() as log:
        checker = make_slot_checker(torch.device(DEVICE))
        assert isinstance(checker, DeviceSlotChecker)
        before = sum(log.waits.values())
        found = run(checker, STEP)
        # Those of the test: tables and slots that it makes on the device.
        assert log.waits["copy from the device"] == 1, "counts and checks come together"
        assert set(log.waits) <= {"copy from the device", "copy to the device"}
        assert before == 0
    assert found == expected


@pytest.mark.parametrize("slot", [1, 4, -2, 2**40])
def test_a_slot_without_an_expert_is_named(slot: int) -> None:
    step = [*STEP, [[[0, 2]], [[3, slot]]]]
    message = f"7: no expert in slot {slot} of bank 0"
    with pytest.raises(RejectedError) as on_cpu:
        run(HostSlotChecker(), step)
    with pretend_gpu(), pytest.raises(RejectedError) as on_gpu:
        run(DeviceSlotChecker(), step)
    assert str(on_cpu.value) == str(on_gpu.value) == message


def test_rows_go_on_without_a_slot_that_has_no_expert() -> None:
    with pretend_gpu():
        device = torch.device(DEVICE)
        slots = torch.tensor([[0, 1], [9, 3]], device=device)
        filled = FilledSlots.of(0, EXPERTS, device)
        used = DeviceSlotChecker().check(filled, RANKS[:1], [slots], reject)
        assert used.slots.tolist() == [[0, -1], [-1, 3]]


def test_what_a_broken_step_left_is_dropped() -> None:
    with pretend_gpu():
        device, checker = torch.device(DEVICE), DeviceSlotChecker()
        filled = FilledSlots.of(0, EXPERTS, device)
        checker.check(filled, RANKS[:1], [torch.tensor([[1, 1]], device=device)], reject)
        assert run(checker, STEP) == [[3, 0, 3, 2]], "it neither counts nor raises"
