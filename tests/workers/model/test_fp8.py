"""Keys and values in 8 bits: the nearest numbers there are, and nothing that is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.model.fp8 import decode, encode


def code_values() -> Tensor:
    """[256] float64: what each code of e4m3 stands for, by its definition."""
    codes = torch.arange(256)
    exponents, mantissas = (codes >> 3 & 15).double(), (codes & 7).double()
    normal = (1 + mantissas / 8) * 2.0 ** (exponents - 7)
    values = torch.where(exponents == 0, mantissas / 8 * 2.0**-6, normal)
    values[codes & 127 == 127] = torch.nan
    return torch.where(codes < 128, values, -values)


def test_every_code_and_scale_is_read_by_its_definition() -> None:
    scales = torch.arange(1, 247)  # larger ones only occur where rounding ends at infinity
    rows = torch.cat((torch.arange(256).expand(len(scales), -1), scales.unsqueeze(1)), 1).to(
        torch.uint8
    )
    expected = code_values() * 2.0 ** (scales.double().unsqueeze(1) - 127)
    torch.testing.assert_close(
        decode(rows, torch.float32).double(), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_become_the_nearest_numbers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 24, generator=generator)
    x *= torch.exp(6 * torch.randn(200, 24, generator=generator))  # small beside large ones
    x = x.to(dtype)
    rows = encode(x)
    scales = 2.0 ** (rows[:, -1:].double() - 127)
    largest = x.float().abs().amax(1, keepdim=True)
    assert (largest <= 448 * scales).all()
    assert (largest > 224 * scales).all(), "a smaller scale would do"
    numbers = code_values().nan_to_num(torch.inf) * scales.unsqueeze(2)  # [rows, 1, 256]
    errors = (x.double().unsqueeze(2) - numbers).abs()
    read = decode(rows, torch.float32)
    assert torch.equal((x.double() - read).abs(), errors.amin(2))
    assert torch.equal(decode(rows, torch.bfloat16).float(), read), "bfloat16 holds them all"


def test_ties_go_to_even_codes() -> None:
    values = [448.0, 432.0, 400.0, -2.125, 2.375, 2**-10, 3 * 2**-10, -0.0]
    read = [448.0, 448.0, 384.0, -2.0, 2.5, 0.0, 2**-8, -0.0]
    found = decode(encode(torch.tensor(values)), torch.float32)
    assert found.tolist() == read
    assert torch.signbit(found[-1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_finite_is_read_as_nan(bad: float) -> None:
    found = decode(encode(torch.tensor([[1.0, bad, 0.0], [1.0, 2.0, 0.0]])), torch.float32)
    assert found[0].isnan().all()
    assert found[1].tolist() == [1.0, 2.0, 0.0]


def test_zeros_are_zeros() -> None:
    assert not decode(encode(torch.zeros(3, 5)), torch.float32).any()
    assert not decode(torch.zeros(3, 6, dtype=torch.uint8), torch.float32).any(), "cleared rows"


def test_small_and_large_floats_survive() -> None:
    """The largest ones round up to infinity, as they do in bfloat16."""
    x = torch.tensor([[1.75 * 2.0**127, 1.0], [2.0**-126, 2.0**-149]])
    expected = [[1.75 * 2.0**127, 0.0], [2.0**-126, 0.0]]
    assert decode(encode(x), torch.float32).tolist() == expected
