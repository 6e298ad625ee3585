"""The compiled search for scales and zero points against its reference, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.workers.native.builds import NAMES, library, team
from workers.native.rounding import round_product, round_weight
from workers.quantization.formats import WeightFormat
from workers.quantization.rounding import FORMATS, candidates, quantize

INT4 = FORMATS["int4"]
FORMS = candidates(INT4, 96)
"""Groups of 32 and 24."""


def _weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(70, 64, generator=generator)
    odd = weight[:4, :64].clone()
    odd[0, 3], odd[1, 40], odd[2, 2] = torch.nan, torch.inf, -torch.inf
    constant, tiny = torch.full((3, 64), 0.3), weight * 1e-38
    return [
        weight,
        weight**5,
        weight.abs(),
        weight[:5, :44],
        torch.zeros(2, 32),
        constant,
        tiny,
        odd,
    ]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_build_and_team_finds_the_bits_of_the_reference(
    name: str, form: WeightFormat
) -> None:
    for weight in _weights():
        expected = quantize(weight, form)
        for workers in (None, team(name, 2)):
            found = round_weight(library(name), weight, form, workers)
            for part, other in zip(found.parts, expected.parts, strict=True):
                assert torch.equal(part.view(torch.uint8), other.view(torch.uint8))


def test_a_row_depends_on_itself_alone() -> None:
    weight = _weights()[0]
    whole, row = quantize(weight, INT4), quantize(weight[33:34], INT4)
    for part, other in zip(whole.parts, row.parts, strict=True):
        assert torch.equal(part[33:34], other)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_product_is_kept_in_the_groups_with_the_least_error(name: str | None) -> None:
    own = None if name is None else library(name)
    weight = torch.randn(300, 96, generator=torch.Generator().manual_seed(1))
    for form in FORMS:
        grid = quantize(weight, form).dequantized()
        assert round_product(own, grid, FORMS).format == form
    assert round_product(own, weight, FORMS).format.group == 24
    assert round_product(own, torch.zeros(2, 96), FORMS).format.group == 32


def test_short_groups_fill_rows_and_take_5_bits_a_number() -> None:
    assert [form.group for form in candidates(INT4, 576)] == [32, 24]
    assert candidates(INT4, 576)[1] == replace(INT4, group=24)
    assert 8 * candidates(INT4, 576)[1].num_bytes((64, 576)) == 5 * 64 * 576
    assert candidates(INT4, 2048) == [INT4]
    assert candidates(FORMATS["int8"], 576) == [FORMATS["int8"]]
