"""What is sent to experts beside the rows equals what torch makes."""

from __future__ import annotations

import pytest
import torch

from tests.workers.native.builds import NAMES, library
from workers.native.exchange import sent_slots

DTYPES = [torch.float32, torch.bfloat16]


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "rows", "top_k"), [(1, 1, 1), (2, 5, 8), (3, 0, 2), (3, 33, 6)])
@pytest.mark.parametrize("name", NAMES)
def test_slots_of_every_rank_are_sent_with_the_weights(
    name: str, ranks: int, rows: int, top_k: int, dtype: torch.dtype
) -> None:
    slots = torch.randint(-1, 40, (ranks, 64), generator=draw(ranks), dtype=torch.int32)
    scores = torch.rand(rows, 64, generator=draw(rows))
    weights, ids = scores.to(dtype).topk(top_k)
    weights[:, :1] = -0.0  # bits are sent, not numbers
    chosen = slots[:, ids]
    assert torch.equal(sent_slots(library(name), slots, ids, None), chosen)
    sent = sent_slots(library(name), slots, ids, weights)
    assert torch.equal(sent[:, :, :top_k], chosen)
    bits = weights.float().contiguous().view(torch.int32)
    assert torch.equal(sent[:, :, top_k:], bits.expand(chosen.shape))


@pytest.mark.parametrize("wrong", [-1, 4, 1 << 40])
@pytest.mark.parametrize("name", NAMES)
def test_an_id_that_is_no_experts_is_refused(name: str, wrong: int) -> None:
    slots = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(IndexError):
        sent_slots(library(name), slots, torch.tensor([[0, 3], [1, wrong]]), None)
