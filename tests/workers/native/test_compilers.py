"""Libraries of the host's compiler and of zig's: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.paths import ROOT
from tests.workers.model.native.test_native_sublayer import CASES, WHOLE, make, serve
from tests.workers.native.builds import NAMES, library
from workers.model.native.blocks import NativeBlocks
from workers.native.build import ZIG_ARGUMENTS, InstructionSet
from workers.native.experts import ExpertShape, SlotTable, expert_rows
from workers.native.library import Library, load_library, runnable
from workers.native.matrix import Matrix
from workers.native.panels import pack
from workers.native.thread_team import ThreadTeam

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [(64, 48, 96), (33, 17, 31)]
"""in, inner, out of the experts."""
PIP_LIMIT_S = 1200.0


def expert_sums(team: ThreadTeam, widths: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Sums [21, out] of four random experts."""
    generator = torch.Generator().manual_seed(1)
    shape = ExpertShape(*widths, dtype)
    table = SlotTable(shape, 4)
    for slot in range(4):
        for i, size in enumerate(shape.matrices):
            weight = (torch.randn(size, generator=generator) / size[1] ** 0.5).to(dtype)
            table.put(slot, i, pack(team.library, weight, is_gated=i == 0))
    return expert_rows(
        team,
        table,
        torch.randn(21, widths[0], generator=generator).to(dtype),
        torch.rand(21, 4, generator=generator).argsort(1)[:, :2],
        torch.rand(21, 2, generator=generator),
        inputs_by="row",
        rounds_products=False,
        dtype=torch.float32,
    )


def results(library: Library) -> dict[str, list[Tensor]]:
    """What every kernel computes, by what it is."""
    team, found = ThreadTeam(library, 1), {}
    for dtype in DTYPES:
        blocks = NativeBlocks(team)
        for name, case in CASES.items():
            rows = serve(make(case, dtype, blocks), case, dtype, WHOLE)
            found[f"half {name} {dtype}"] = [part for own in rows for part in own]
        for widths in WIDTHS:
            found[f"experts {widths} {dtype}"] = [expert_sums(team, widths, dtype)]
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(71, 130, generator=generator)
        rows_in = torch.randn(150, 130, generator=generator)
        matrix = Matrix(team, weight.to(dtype), torch.linspace(-1, 1, 71))
        found[f"linear {dtype}"] = [matrix.multiply(rows_in.to(dtype))]
    return found


def differences(ours: Library, theirs: Library) -> list[str]:
    """Kernels of which the two libraries make other bits."""
    first, second = results(ours), results(theirs)
    return [
        what
        for what, tensors in first.items()
        if not all(torch.equal(a, b) for a, b in zip(tensors, second[what], strict=True))
    ]


@pytest.fixture(scope="module")
def zig(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose only C compiler is the pinned one of zig."""
    folder = tmp_path_factory.mktemp("zig")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    wanted = ["--constraint", str(ROOT / "constraints.txt"), "ziglang"]
    subprocess.run([*pip, *wanted], check=True, timeout=PIP_LIMIT_S)
    command = folder / "zig-cc"
    command.write_text(f'#!/bin/sh\nexec {folder}/ziglang/zig {" ".join(ZIG_ARGUMENTS)} "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "CC": str(command), "ZIG_GLOBAL_CACHE_DIR": str(folder / "cache")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("wanted", runnable(), ids=NAMES)
def test_both_compilers_make_the_same_bits(
    wanted: InstructionSet, zig: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", zig["ZIG_GLOBAL_CACHE_DIR"])
    theirs = load_library(wanted, tmp_path, zig)
    assert differences(library(wanted.name), theirs) == []
