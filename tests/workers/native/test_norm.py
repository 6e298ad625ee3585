"""Native norms: near torch's, and with bits of their own in each row."""

from __future__ import annotations

import pytest
import torch

from tests.workers.native.builds import NAMES, team
from workers.model.layers import rms_norm
from workers.native.norm import norm_rows


@pytest.mark.parametrize("size", [1, 5, 16, 48, 515])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_near_those_of_torch_and_rows_their_own(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(7, size, generator=generator).mul_(5).to(dtype)
    rows[3] = 0
    weight = (torch.rand(size, generator=generator) + 0.5).to(dtype)
    expected = rms_norm(rows.clone(), weight, 1e-5).double()
    found = [norm_rows(team(name), rows.clone(), weight, 1e-5) for name in NAMES]
    limit = 1e-6 if dtype == torch.float32 else 0.01
    for whole in found:
        assert whole.dtype == dtype
        assert ((whole.double() - expected).abs() <= limit * (1 + expected.abs())).all()
        assert torch.equal(whole, found[0]), "all instruction sets have the same bits"
    for row, whole in zip(rows, found[0], strict=True):
        assert torch.equal(norm_rows(team(NAMES[0]), row.clone()[None], weight, 1e-5)[0], whole)
