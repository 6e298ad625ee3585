"""Where tests run the kernels for GPUs. Skips a module where Triton cannot be installed."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
"""A GPU, or Triton's interpreter: see ``tests/conftest.py``."""
