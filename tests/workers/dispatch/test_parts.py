"""Large exchanges are computed in parts, between which other step groups are served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.dispatch.row_serving import Interleaving, StaticServing, part_rows

BANK: Any = SimpleNamespace(index=0, num_experts=16, top_k=2)
EXCHANGE: Any = SimpleNamespace(index=0, per_slot_input=False, out_width=3)
NUM_ROWS = 150
"""More than two parts of 64 rows."""


class Slots:
    """Records the number of rows or pairs of each call."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def compute_rows(
        self, _: int, rows: Tensor, slots: Tensor, weights: Tensor, *__: Any
    ) -> Tensor:
        self.sizes.append(len(rows))
        return rows * (slots.clamp(min=0) * weights).sum(1, keepdim=True)

    def compute(self, _: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        self.sizes.append(len(pair_input))
        return inputs[pair_input] * pair_slot.unsqueeze(1)


def batch_of(slots: Tensor) -> Any:
    draw = torch.Generator().manual_seed(1)
    here = slots >= 0
    return SimpleNamespace(
        inputs=torch.rand(NUM_ROWS, 3, generator=draw),
        slots=slots,
        weights=torch.rand(NUM_ROWS, 2, generator=draw),
        used=SimpleNamespace(all_here=bool(here.all()), any_here=bool(here.any())),
    )


@pytest.mark.parametrize("method", ["_sum", "_compute"])
@pytest.mark.parametrize("first_here", [0, 70])
def test_parts_have_the_outputs_of_the_whole(method: str, first_here: int) -> None:
    """Also if the first rows have no expert here."""
    slots = torch.arange(2 * NUM_ROWS).reshape(-1, 2) % 16
    slots[:first_here] = -1
    found, served, is_needed = [], list[int](), [False]
    for is_needed[0] in (False, True):
        bank = Slots()
        side: Any = SimpleNamespace(slots=[bank], dtype=torch.float32, device=torch.device("cpu"))
        transport: Any = SimpleNamespace(sums_are_rounded=False)
        serving = StaticServing(side, transport)
        sizes = bank.sizes
        serve_others = lambda sizes=sizes: served.append(len(sizes))  # noqa: E731
        serving.interleaving = Interleaving(lambda: is_needed[0], serve_others)
        found.append(getattr(serving, method)(BANK, EXCHANGE, batch_of(slots)))
        if not is_needed[0]:
            assert (len(sizes), served) == (1, [])
    assert torch.equal(*found)
    number = NUM_ROWS if method == "_sum" else 2 * (NUM_ROWS - first_here)
    size = part_rows(BANK) * (1 if method == "_sum" else 2)
    assert len(served) == -(-number // size) - 1
    skipped = first_here // size if method == "_sum" else 0
    assert sum(sizes) == number - skipped * size
    assert max(sizes) == size


def test_a_part_has_some_rows_for_each_expert() -> None:
    assert part_rows(BANK) == 64
    few: Any = SimpleNamespace(num_experts=1, top_k=16)
    assert part_rows(few) == 1
