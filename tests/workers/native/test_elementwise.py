"""Functions of one number: against torch, and the same bits in all builds."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from tests.workers.native.builds import NAMES
from workers.native.build import SOURCES, build
from workers.native.library import runnable

C_SOURCES = Path(__file__).parent / "c"

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3.4e38, -3.4e38]


def numbers() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-8, 8, (4099,), generator=generator)
    return torch.cat((torch.randn(4099, generator=generator) * scales, torch.tensor(SPECIAL)))


@cache
def functions(name: str) -> ctypes.CDLL:
    """``c/elementwise.c`` with the kernels' headers, built for an instruction set."""
    wanted = next(wanted for wanted in runnable() if wanted.name == name)
    flags = (*wanted.compiler_flags, "-I", str(SOURCES))
    with TemporaryDirectory() as folder:
        path = build(replace(wanted, compiler_flags=flags), Path(folder), sources=C_SOURCES)
        loaded = ctypes.CDLL(str(path))
    for function in (loaded.silu_of, loaded.bf16_of):
        function.restype = None
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)
    return loaded


def silu(name: str, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    functions(name).silu_of(out.data_ptr(), x.data_ptr(), x.numel())
    return out


@pytest.mark.parametrize("name", NAMES)
def test_silu_is_accurate(name: str) -> None:
    x = torch.cat((torch.linspace(-86, 100, 30_001), numbers().clamp(-86, 1e30)))
    found, expected = silu(name, x).double(), torch.nn.functional.silu(x.double())
    assert torch.equal(found.isnan(), expected.isnan())
    is_number = ~expected.isnan()
    error = (found - expected).abs()[is_number]
    assert (error <= expected.abs()[is_number] * 4e-7 + 1e-44).all()
    far = torch.tensor([-1e3, -1e38])
    assert (silu(name, far).abs() <= 1e-37 * far.abs()).all()


def test_silu_has_the_same_bits_in_all_builds() -> None:
    bits = [silu(name, numbers()).view(torch.int32) for name in NAMES]
    assert all(torch.equal(own, bits[0]) for own in bits)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_rounded_as_in_torch(name: str) -> None:
    x = torch.cat((numbers(), numbers().bfloat16().float() * (1 + 2.0**-8)))  # ties
    out = torch.empty_like(x, dtype=torch.bfloat16)
    functions(name).bf16_of(out.data_ptr(), x.data_ptr(), x.numel())
    found, expected = out.view(torch.int16), x.bfloat16().view(torch.int16)
    is_number = ~x.isnan()
    assert torch.equal(found[is_number], expected[is_number])
    assert (found[~is_number] == 0x7FC0).all()
