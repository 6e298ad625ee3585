"""The hash by which deterministic workers see whether they compute alike."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from workers.model.batch_invariant.numerics import numerics_digest


def test_the_digest_is_the_same_each_time_and_in_other_processes() -> None:
    module = "workers.model.batch_invariant.numerics"
    code = f"from {module} import numerics_digest; print(numerics_digest())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert found.stdout.strip() == numerics_digest() == numerics_digest()


def test_another_instruction_set_has_another_digest() -> None:
    """torch without vector instructions stands for another processor."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch uses no vector instructions on this machine")
    module = "workers.model.batch_invariant.numerics"
    code = f"from {module} import numerics_digest; print(numerics_digest())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
        check=True,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert found.stdout.strip() != numerics_digest()
