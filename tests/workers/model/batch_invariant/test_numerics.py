"""The names by which workers see whether they compute alike."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.workers.native.builds import NAMES, library
from workers.model.batch_invariant.numerics import arithmetic_of, torch_digest

pytestmark = pytest.mark.heavy


def digest_elsewhere(with_products: bool, **environment: str) -> str:
    """``torch_digest`` of another process with one thread."""
    module = "workers.model.batch_invariant.numerics"
    code = f"from {module} import torch_digest; print(torch_digest({with_products}))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=540,
    )
    return found.stdout.strip()


def test_the_digest_is_the_same_each_time_and_in_other_processes() -> None:
    assert digest_elsewhere(True) == torch_digest(True) == torch_digest(True)


@pytest.mark.parametrize("with_products", [True, False])
def test_another_instruction_set_has_another_digest(with_products: bool) -> None:
    """torch without vector instructions stands for another processor."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch uses no vector instructions on this processor")
    other = digest_elsewhere(with_products, ATEN_CPU_CAPABILITY="default")
    assert other != torch_digest(with_products)


def test_products_of_torch_count_only_where_they_are_made() -> None:
    assert torch_digest(True) != torch_digest(False)


@pytest.mark.slow
def test_float32_has_one_arithmetic_on_all_instruction_sets() -> None:
    (arithmetic,) = {arithmetic_of(library(name), torch.float32) for name in NAMES}
    assert arithmetic.startswith("float32 ")


def test_bfloat16_has_one_arithmetic_but_for_dot_products() -> None:
    found = {name: arithmetic_of(library(name), torch.bfloat16) for name in NAMES}
    dot = found.pop("avx512_bf16", None)
    if dot is not None:
        assert dot.startswith("bfloat16-dot ")
        assert dot.split()[1] not in {arithmetic.split()[1] for arithmetic in found.values()}
    (fused,) = set(found.values())
    assert fused.startswith("bfloat16-fma ")
