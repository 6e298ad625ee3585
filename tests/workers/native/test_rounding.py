"""The compiled search for scales and zero points against its reference, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.native.builds import NAMES, library, team
from workers.native.rounding import round_weight
from workers.quantization.rounding import FORMATS, quantize

INT4 = FORMATS["int4"]


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


@pytest.mark.parametrize("name", NAMES)
def test_every_build_and_team_finds_the_bits_of_the_reference(name: str) -> None:
    for weight in _weights():
        expected = quantize(weight, INT4)
        for workers in (None, team(name, 2)):
            found = round_weight(library(name), weight, INT4, workers)
            for part, other in zip(found.parts, expected.parts, strict=True):
                assert torch.equal(part.view(torch.uint8), other.view(torch.uint8))


def test_a_row_depends_on_itself_alone() -> None:
    weight = _weights()[0]
    whole, row = quantize(weight, INT4), quantize(weight[33:34], INT4)
    for part, other in zip(whole.parts, row.parts, strict=True):
        assert torch.equal(part[33:34], other)
