"""Expert banks that wait instead of computing."""

from __future__ import annotations

import pytest
import torch

from workers.experts.paced import Pace, PacedBank
from workers.families.base import BankSpec, ExchangeSpec

SPEC = BankSpec(
    index=0,
    bank="mlp",
    layer=0,
    num_experts=8,
    top_k=2,
    exchanges=(ExchangeSpec(index=0, name="mlp", in_width=4, out_width=6, expert_width=2),),
)


class SlowClock:
    """Time passes when somebody sleeps, a little more than asked for."""

    def __init__(self, too_long: float = 0.0) -> None:
        self.now = 50.0
        self.slept: list[float] = []
        self._too_long = too_long

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self._too_long


def run(bank: PacedBank, *slots: int) -> torch.Tensor:
    pairs = torch.arange(len(slots))
    return bank.compute(0, torch.ones(len(slots), 4), pairs, torch.tensor(slots))


def test_a_step_takes_its_slots_and_its_pairs() -> None:
    clock = SlowClock()
    bank = PacedBank(SPEC, Pace(slot_s=0.5, token_s=0.25), clock.read, clock.sleep)
    output = run(bank, 3, 3, 1, 3)
    assert clock.slept == pytest.approx([2 * 0.5 + 4 * 0.25])
    assert output.shape == (4, 6)
    assert not output.any()


def test_what_was_overslept_is_taken_off_the_next_wait() -> None:
    clock = SlowClock(too_long=0.125)
    bank = PacedBank(SPEC, Pace(slot_s=1.0, token_s=0.0), clock.read, clock.sleep)
    for _ in range(4):
        run(bank, 2)
    assert clock.slept == pytest.approx([1.0, 0.875, 0.875, 0.875])
    assert clock.now == pytest.approx(54.125)
