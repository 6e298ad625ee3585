"""A worker measures how fast it works on experts."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import Tensor

from benchmarks.placement.paced import ComputeTime, PacedBank
from tests.benchmarks.test_paced import SPEC, SlowClock
from workers.experts.bank import ExpertBank
from workers.experts.speed import blank_bank, rounded, slots_per_second

CPU = torch.device("cpu")


def speed_of(slot_s: float, num_slots: int = 4) -> float:
    clock = SlowClock()
    bank = PacedBank(SPEC, ComputeTime(slot_s=slot_s, token_s=0.0), clock.read, clock.sleep)
    return slots_per_second(bank.compute, SPEC, range(num_slots), torch.float32, CPU, clock.read)


def test_a_device_that_takes_twice_as_long_is_half_as_fast() -> None:
    assert speed_of(0.01) == pytest.approx(100.0, rel=0.05)
    assert speed_of(0.01) / speed_of(0.02) == pytest.approx(2.0, rel=0.1)
    assert speed_of(0.01, num_slots=2) == speed_of(0.01, num_slots=8)


def test_small_differences_are_none() -> None:
    assert speed_of(0.0100) == speed_of(0.0101)
    assert rounded(rounded(123.0)) == pytest.approx(rounded(123.0))
    assert all(0.95 < rounded(x) / x < 1.05 for x in (0.03, 1.0, 7.7, 1e5))


class NoisyBank:
    """Now and then something else has the processor."""

    def __init__(self) -> None:
        self.now = 0.0
        self._runs = count()

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        self.now += 0.01 if next(self._runs) % 3 == 1 else 0.5
        return inputs.new_zeros(len(pair_slot), 6)


def test_the_best_run_counts() -> None:
    bank = NoisyBank()
    found = slots_per_second(bank.compute, SPEC, [0, 3], torch.float32, CPU, lambda: bank.now)
    assert found == pytest.approx(200.0, rel=0.05)


def test_a_device_without_experts_has_a_speed_too() -> None:
    empty = ExpertBank(SPEC, 2, torch.float32, CPU)
    bank = blank_bank(empty)
    assert bank.num_slots == 1
    assert slots_per_second(bank.compute, SPEC, [0], torch.float32, CPU) > 0
