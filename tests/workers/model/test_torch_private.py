"""The bounds of torch's releases, and that private functions are named in one module."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import torch

from tests.paths import ROOT
from workers.model.torch_private import check_version


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.13.0+cpu", "2.13.1", "2.12.0a0+git1", torch.__version__]
)
def test_tested_releases_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "2.14.0a0+git1", "3.0.0", "1.13.1"])
def test_other_releases_are_refused_by_name(version: str) -> None:
    message = f"torch {version} is not supported: must be at least 2.11 and below 2.14"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        check_version(version)


def test_the_package_asks_for_the_same_releases() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "torch>=2.11,<2.14" in project["dependencies"]


def test_no_other_module_names_a_private_function() -> None:
    private = re.compile(r"\btorch(\.\w+)*\._[a-z]|\b(_start_coalescing|_Options|_C)\b")
    folders = [ROOT / name for name in ("workers", "cluster", "gateway")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    found = {file.name for file in files if private.search(file.read_text(encoding="utf-8"))}
    assert found == {"torch_private.py"}


_WITHOUT_ONEDNN = """
from types import SimpleNamespace
import torch
torch._C._has_mkldnn = False
torch.ops.mkldnn = SimpleNamespace()
from workers.experts.loops import expert_products
from workers.model.layers import Linear, can_pack
weight, rows = torch.randn(512, 512), torch.randn(3, 512)
assert not can_pack(weight)
torch.testing.assert_close(Linear(weight)(rows), rows @ weight.T)
torch.testing.assert_close(expert_products(rows, [3], [weight], False), rows @ weight.T)
"""


def test_a_torch_without_onednn_computes_with_plain_weights() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_ONEDNN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
