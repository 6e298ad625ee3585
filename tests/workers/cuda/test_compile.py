"""Kernels compile for the GPUs that we name, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.workers.cuda.device import SHARED_BYTES

KERNELS = {
    *("_align", "_count", "_sum_tiles", "_multiply", "_sum_rows"),
    *("_decode", "_combine", "_prefill", "_prepare", "_norm", "_choose"),
    *("_choose_slots", "_check", "_draw"),
}
PRODUCTS = {"_multiply", "_decode", "_prefill"}


def compiled(capability: int, dtype: str, folder: Path, *more: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "tests.workers.cuda.compile_offline", str(capability), dtype]
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [*command, *more], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, object]], capability: int, dtype: str) -> None:
    assert {line["kernel"] for line in found} == KERNELS
    for line in found:
        assert int(str(line["shared_bytes"])) <= SHARED_BYTES[capability], line
        is_product = line["kernel"] in PRODUCTS
        assert line["has_tensor_cores"] == (is_product and dtype != "float32"), line


@pytest.mark.parametrize("capability", [90])
def test_kernels_compile_for(capability: int, tmp_path: Path) -> None:
    check(compiled(capability, "bfloat16", tmp_path), capability, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_of_all_shapes_compile_for(capability: int, dtype: str, tmp_path: Path) -> None:
    check(compiled(capability, dtype, tmp_path, "all"), capability, dtype)
