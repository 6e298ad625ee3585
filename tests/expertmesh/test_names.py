"""Public names of ``expertmesh``."""

from __future__ import annotations

import subprocess
import sys

import pytest

import expertmesh
from tests.paths import ROOT


def test_all_names_can_be_imported_and_listed() -> None:
    assert set(expertmesh.__all__) <= set(dir(expertmesh))
    assert all(getattr(expertmesh, name).__name__ == name for name in expertmesh.__all__)


def test_names_that_its_modules_import_are_not_public() -> None:
    with pytest.raises(AttributeError, match="module 'expertmesh' has no attribute 'Mapping'"):
        _ = expertmesh.Mapping


def test_clients_import_neither_ray_nor_torch() -> None:
    code = (
        "import sys\nfrom expertmesh import AsyncClient, Client, SamplingParams\n"
        "print([name for name in ('ray', 'torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
