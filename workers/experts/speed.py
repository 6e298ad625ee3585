"""Speed of a device on its experts, measured once when the weights of experts are in memory.

A decode step reads the weights of every activated slot and computes little, so the measurement runs
one row for each filled slot of a bank. The fastest of several runs counts, because other processes
on the host can only slow a run down. The result is rounded, so that identical devices usually get
the same value.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.experts.bank import ExpertBank
from workers.model.config import BankSpec
from workers.quantization.matrix import empty_weight, parts_of

_RUNS = 9
_GRAIN = 1.1
"""Factor between neighbouring results: every measured speed is rounded to a power of this
factor."""


def slots_per_second(
    compute: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    spec: BankSpec,
    filled: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the number of expert slots that a device computes per second.

    ``compute`` is ``ExpertBank.compute``; ``filled`` lists the slots that hold an expert.
    """
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
            compute(exchange.index, rows, pairs, slots)[0, 0].item()  # device-to-host sync
        best = min(best, clock() - began)
    return rounded(len(filled) / max(best, 1e-9))


def blank_bank(like: ExpertBank) -> ExpertBank:
    """Return a bank of one slot with an expert of zeros, to measure the speed of a device without
    experts."""
    bank = ExpertBank(like.spec, 1, like.dtype, like.device, like.make)
    for exchange, matrix, shape in like.spec.matrices:
        form = like.spec.exchanges[exchange].form_of(matrix)
        weight = empty_weight(form, shape, like.dtype)
        for part in parts_of(weight):
            part.zero_()
        bank.store(0, exchange, matrix, weight)
    return bank


def rounded(speed: float) -> float:
    """Return the power of 1.1 nearest to a speed, so that identical devices get the same number."""
    return _GRAIN ** round(math.log(speed) / math.log(_GRAIN))
