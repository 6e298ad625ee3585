"""The kernels that choose, and that check and count slots, against torch and Python."""

from __future__ import annotations

import pytest
import torch

from tests.workers.cuda.device import DEVICE
from workers.cuda.slots import check_slots, slots_by_rank


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


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_is_row", [False, True])
@pytest.mark.parametrize(("num_rows", "top_k"), [(0, 2), (1, 1), (5, 3), (150, 8)])
def test_slots_of_every_rank_are_chosen(
    num_rows: int, top_k: int, has_is_row: bool, dtype: torch.dtype | None
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    table = torch.randint(-1, 9, (3, 11), generator=generator, dtype=torch.int32)
    ids = torch.randint(0, 11, (num_rows, top_k), generator=generator)
    weights = None if dtype is None else torch.randn(ids.shape, generator=generator).to(dtype)
    is_row = torch.randint(0, 2, (num_rows,), generator=generator) if has_is_row else None
    slots = table[:, ids]
    if is_row is not None:
        slots = slots.where(is_row.unsqueeze(1) != 0, -1)
    if weights is not None:
        bits = weights.float().view(torch.int32)
        slots = torch.cat((slots, bits.expand(slots.shape)), dim=2)
    on_device = [None if part is None else part.to(DEVICE) for part in (weights, is_row)]
    found = slots_by_rank(table.to(DEVICE), ids.to(DEVICE), *on_device)
    assert found.dtype == torch.int32
    assert torch.equal(found.cpu(), slots)
