"""Fixtures for all tests. One compute thread, so that float32 results do not depend on the machine.

The number of threads must be set before torch is imported.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.fakes import write_tiny_checkpoint
from tests.goldens import Golden, load_golden
from tests.second_try import pytest_runtest_protocol

__all__ = ["pytest_runtest_protocol"]

settings.register_profile(
    "here",
    deadline=None,
    database=None,
    max_examples=60,
    derandomize=True,
    print_blob=True,
)
settings.load_profile("here")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """``golden(variant)``: a golden checkpoint with its expected outputs, read once."""
    return lru_cache(maxsize=None)(load_golden)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE of two layers, 8 experts, top-2, vocabulary 96, float32."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(path)
    return path
