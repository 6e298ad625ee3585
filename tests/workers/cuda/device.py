"""Where tests run the kernels for GPUs. Skips a module where Triton cannot be installed."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
"""A GPU, or Triton's interpreter: see ``tests/conftest.py``."""
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""Shared memory that a block of threads can have, by compute capability (CUDA C++ Programming
Guide)."""
