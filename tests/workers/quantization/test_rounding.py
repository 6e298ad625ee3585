"""Matrices that are quantized when they are loaded."""

from __future__ import annotations

import pytest
import torch

from workers.quantization.formats import WeightFormat
from workers.quantization.rounding import FORMATS, candidates, quantize, squared_error

ALL = [
    *FORMATS.values(),
    WeightFormat(codes="int4", group=64),
    WeightFormat(codes="int8", group=None),
]


@pytest.mark.parametrize("form", ALL, ids=str)
@pytest.mark.parametrize("shape", [(5, 256), (3, 70), (1, 2)])
def test_a_number_is_off_by_half_a_step_and_the_scales_rounding(
    form: WeightFormat, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrix = quantize(weight, form)
    assert matrix.format == form
    assert matrix.nbytes == form.num_bytes(shape)
    steps = matrix.float_scales().repeat_interleave(form.group or shape[1], 1)[:, : shape[1]]
    limit = 0.5 + 2**-9 * 128  # a scale of bfloat16 that was rounded down moves the ends
    assert ((matrix.dequantized() - weight).abs() <= limit * steps).all()
    assert (matrix.dequantized() - weight).square().mean() <= steps.square().mean() / 11


def test_the_error_is_that_of_the_bits() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    errors = {
        name: (quantize(weight, form).dequantized() - weight).square().mean().sqrt()
        for name, form in FORMATS.items()
    }
    assert 0.003 < errors["int8"] < 0.008
    assert 0.05 < errors["int4"] < 0.08


@pytest.mark.parametrize("form", ALL, ids=str)
def test_zeros_stay_zeros(form: WeightFormat) -> None:
    weight = torch.zeros(2, 256)
    weight[0, 3] = 5.0
    matrix = quantize(weight, form).dequantized()
    assert matrix[1].tolist() == [0.0] * 256
    assert matrix[0, 3] == pytest.approx(5.0, rel=0.01)
    assert matrix.count_nonzero() == 1


@pytest.mark.parametrize("form", ALL, ids=str)
def test_what_is_no_number_stays_none(form: WeightFormat) -> None:
    weight = torch.ones(2, 64)
    weight[1, 5] = torch.nan
    assert quantize(weight, form).dequantized()[1].isnan().any()


def test_what_is_quantized_again_is_the_same() -> None:
    for form in FORMATS.values():
        once = quantize(torch.randn(4, 128), form)
        again = quantize(once.dequantized(), form)
        assert torch.equal(again.dequantized(), once.dequantized())


def _symmetric(weight: torch.Tensor) -> torch.Tensor:
    """4 bits where the largest number of 32 gets the code 7."""
    form = WeightFormat(codes="int4", group=32, scales="bfloat16")
    return quantize(weight, form).dequantized()


def test_the_error_of_4_bits_is_at_most_0_7_of_symmetric_codes() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    found = quantize(weight, FORMATS["int4"]).dequantized()
    assert (found - weight).square().sum() <= 0.7 * (_symmetric(weight) - weight).square().sum()


def test_int4_takes_less_than_5_bits_a_number() -> None:
    assert 8 * FORMATS["int4"].num_bytes((64, 512)) == 4.75 * 64 * 512


def test_a_grid_of_16_steps_with_a_minimum_is_found_again() -> None:
    """As Q4_1 of llama.cpp stores numbers: a step and a least number for each 32."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (64, 32), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 15
    step = 0.01 + torch.rand(64, 1, generator=generator)
    weight = step * (codes - 4 - 6 * torch.rand(64, 1, generator=generator))
    found = quantize(weight, FORMATS["int4"]).dequantized()
    assert ((found - weight).abs() <= 0.08 * step).all()
    assert (found - weight).square().sum() <= 0.02 * (_symmetric(weight) - weight).square().sum()


def test_the_squared_error_is_that_of_all_numbers() -> None:
    weight = torch.randn(301, 74, generator=torch.Generator().manual_seed(4))
    matrix = quantize(weight, FORMATS["int4"])
    expected = (matrix.dequantized() - weight).double().square().sum()
    assert squared_error(matrix, weight) == pytest.approx(float(expected), rel=1e-6)
    assert squared_error(matrix, matrix.dequantized()) == 0


def test_the_squared_error_has_the_same_bits_on_all_machines() -> None:
    """So that all of them choose the same groups; sums of torch would depend on instructions."""
    weight = (torch.arange(300 * 72) * 7919 % 1009).view(300, 72) / 1009 - 0.5
    forms = candidates(FORMATS["int4"], 72)
    found = [squared_error(quantize(weight, form), weight).hex() for form in forms]
    assert found == ["0x1.9827b04000000p+2", "0x1.5ebfad8000000p+2"]
