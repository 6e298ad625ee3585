"""How fast a device works on its experts: measured once, when their weights are in memory.

A decode step reads the weights of every activated slot and computes little, so that is what is
timed: one row for each filled slot of a bank. The best of some runs counts, as whatever else runs
on a host only makes one slower; and it is rounded, so that equal devices are found equal more often
than not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from workers.experts.bank import ExpertBank
from workers.families.base import BankSpec

_RUNS = 9
_GRAIN = 1.1
"""Speeds that differ by less count as equal, or as one step apart."""


class Computes(Protocol):
    """What is timed: an ``ExpertBank`` or what stands in for one."""

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """See ``ExpertBank.compute``."""


def slots_per_second(
    bank: Computes,
    spec: BankSpec,
    filled: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Expert slots that a device gets through in a second; ``filled`` are some that hold one."""
    slots = torch.tensor(list(filled), dtype=torch.int64, device=device)
    pairs = torch.arange(len(filled), device=device)
    inputs = [
        torch.ones(len(filled), exchange.in_width, dtype=dtype, device=device)
        for exchange in spec.exchanges
    ]
    best = math.inf
    for _ in range(_RUNS):
        began = clock()
        for exchange, rows in zip(spec.exchanges, inputs, strict=True):
            bank.compute(exchange.index, rows, pairs, slots)[0, 0].item()  # device-to-host sync
        best = min(best, clock() - began)
    return rounded(len(filled) / max(best, 1e-9))


def blank_bank(like: ExpertBank) -> ExpertBank:
    """A bank of one slot whose expert is all zeros, for a device that holds none."""
    bank = ExpertBank(like.spec, 1, like.dtype, like.device)
    for exchange in like.spec.exchanges:
        for matrix, shape in enumerate(exchange.matrix_shapes):
            bank.store(0, exchange.index, matrix, torch.zeros(shape, dtype=like.dtype))
    return bank


def rounded(speed: float) -> float:
    """The nearest power of 1.1: whoever is as fast gets the same number."""
    return _GRAIN ** round(math.log(speed) / math.log(_GRAIN))
