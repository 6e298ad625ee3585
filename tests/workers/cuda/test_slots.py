"""The kernel that checks and counts slots, against the same in Python."""

from __future__ import annotations

import pytest
import torch

from tests.workers.cuda.device import DEVICE
from workers.cuda.slots import check_slots


@pytest.mark.parametrize(("num_rows", "top_k"), [(0, 2), (1, 1), (5, 3), (70, 8), (300, 6)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_are_checked_and_counted(num_rows: int, top_k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    num_slots = 5
    filled = torch.tensor([True, False, True, True, False, True])
    sent = torch.randint(-2, num_slots + 2, (num_rows, 2 * top_k), generator=generator)
    sent[::3] = -1
    slots = sent[:, :top_k]  # weights follow
    is_here = (slots >= 0) & (slots < num_slots)
    is_here &= filled[slots.where(is_here, num_slots)]
    checked = torch.full((num_rows, top_k), 99, device=DEVICE)
    bins = torch.ones(num_slots, dtype=torch.int64, device=DEVICE)
    flags = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    check_slots(sent.to(DEVICE, dtype)[:, :top_k], filled.to(DEVICE), checked, bins, flags)
    assert checked.tolist() == slots.where(is_here, -1).tolist()
    assert bins.tolist() == [1 + int((slots[is_here] == own).sum()) for own in range(num_slots)]
    wrong = int(((slots != -1) & ~is_here).sum())
    assert flags.tolist() == [wrong, int(is_here.any(1).sum()), int(is_here.sum())]
