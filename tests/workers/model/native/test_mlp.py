"""Native MLPs: near torch's, and to the bit the same in any batch and team."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.native.builds import NAMES, team
from workers.model.building_blocks import BuildingBlocks
from workers.model.layers import GatedMlp, Mlp
from workers.model.native.blocks import NativeBlocks
from workers.model.native.products import NativeLinear, NativeMlp
from workers.quantization.rounding import FORMATS

WIDTHS = [(48, 40), (33, 17), (256, 704)]
"""Outer and inner; the second is no multiple of anything."""
DTYPES = [torch.float32, torch.bfloat16]


def make(blocks: BuildingBlocks, widths: tuple[int, int], dtype: torch.dtype) -> Mlp:
    """The same random MLP from any blocks."""
    generator, (width, inner) = torch.Generator().manual_seed(1), widths

    def weight(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return values.mul_(columns**-0.5).to(dtype)

    return blocks.mlp(lambda: weight(2 * inner, width), lambda: weight(width, inner), "silu")


def rows_of(width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(150, width, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_near_torch(name: str, widths: tuple[int, int], dtype: torch.dtype) -> None:
    rows = rows_of(widths[0], dtype)
    found = make(NativeBlocks(team(name)), widths, dtype)(rows)
    expected = make(BuildingBlocks(), widths, dtype)(rows).float()
    assert found.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert ((found.float() - expected).abs() <= limit * (1 + expected.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_bits_depend_on_the_row_alone(
    name: str, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    rows = rows_of(widths[0], dtype)
    mlp = make(NativeBlocks(team(name)), widths, dtype)
    together = mlp(rows)
    for first, last in [(0, 1), (7, 8), (3, 20), (50, 149)]:
        assert torch.equal(mlp(rows[first:last]), together[first:last])
    assert torch.equal(make(NativeBlocks(team(name, 3)), widths, dtype)(rows), together)


def test_other_activations_are_those_of_torch() -> None:
    blocks = NativeBlocks(team(NAMES[0]))
    assert isinstance(make(blocks, WIDTHS[0], torch.float32), NativeMlp)
    zeros = torch.zeros(8, 4), torch.zeros(4, 4)
    assert isinstance(blocks.mlp(lambda: zeros[0], lambda: zeros[1], "gelu"), GatedMlp)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_stage_by_stage(name: str, widths: tuple[int, int], dtype: torch.dtype) -> None:
    """As near to the whole as the rounding between stages allows; bits are the row's own."""
    rows, mlp = rows_of(widths[0], dtype), make(NativeBlocks(team(name)), widths, dtype)

    def stages(x: Tensor) -> Tensor:
        return mlp.down(mlp.activate(mlp.gate_up(x)))

    gate_up = make(BuildingBlocks(), widths, dtype).gate_up(rows).float()
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert ((mlp.gate_up(rows).float() - gate_up).abs() <= limit * (1 + gate_up.abs())).all()
    together, whole = stages(rows), mlp(rows).float()
    assert ((together.float() - whole).abs() <= limit * (1 + whole.abs())).all()
    for first, last in [(0, 1), (7, 8), (3, 20), (50, 149)]:
        assert torch.equal(stages(rows[first:last]), together[first:last])


@pytest.mark.parametrize(("widths", "group"), [((96, 48), 24), ((96, 80), 32), ((64, 48), 32)])
@pytest.mark.parametrize("name", NAMES)
def test_both_weights_are_quantized_in_groups_that_fill_their_rows(
    name: str, widths: tuple[int, int], group: int
) -> None:
    mlp = make(NativeBlocks(team(name), FORMATS["int4"]), widths, torch.float32)
    assert isinstance(mlp, NativeMlp)
    form = mlp.table.shape.form
    assert form is not None
    assert form.group == group
    rows = rows_of(widths[0], torch.float32)
    found, expected = mlp(rows), make(BuildingBlocks(), widths, torch.float32)(rows)
    assert 0.01 < float((found - expected).norm() / expected.norm()) < 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_product_is_near_its_weight_in_groups_that_fill_its_rows(name: str) -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(3))
    rows, errors = rows_of(96, torch.float32), {}
    for columns, group in ((96, 24), (64, 32)):
        own = weight[:, :columns].contiguous()
        embedding, head = NativeBlocks(team(name), FORMATS["int4"]).tied(own)
        assert torch.equal(embedding(torch.tensor([3, 69])), own[[3, 69]])
        assert isinstance(head, NativeLinear)
        assert head.matrix.form is not None
        assert head.matrix.form.group == group
        x = rows[:, :columns].contiguous()
        errors[group] = float((head(x) - x @ own.T).norm() / (x @ own.T).norm())
    assert 0.01 < errors[24] < errors[32] < 0.1
