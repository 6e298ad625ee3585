"""Huge pages: memory in use is collapsed and keeps its contents, the rest stays untouched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.harness.distributed import run_ranks
from workers.model.huge_pages import collapse

MIB = 1024**2
NUM_BYTES = 16 * MIB


def system_collapses() -> bool:
    """Linux 6.1 and later, unless the administrator switched huge pages off."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    release = re.match(r"(\d+)\.(\d+)", Path("/proc/sys/kernel/osrelease").read_text())
    assert release is not None
    is_new = (int(release[1]), int(release[2])) >= (6, 1)
    return is_new and setting.exists() and "[never]" not in setting.read_text()


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def collapse_here(rank: int, size: int, ports: list[int]) -> tuple[int, int, bool]:
    """Collapsed bytes, how much more memory is in use, and whether it has its contents."""
    used = torch.arange(NUM_BYTES // 8)
    empty = torch.empty(8 * NUM_BYTES, dtype=torch.uint8)  # none of its pages was touched
    before = anonymous_bytes()
    collapsed = collapse(limit_s=60.0)
    grown = anonymous_bytes() - before
    del empty
    return collapsed, grown, torch.equal(used, torch.arange(NUM_BYTES // 8))


@pytest.mark.skipif(not system_collapses(), reason="the system has no MADV_COLLAPSE")
def test_memory_in_use_is_collapsed_and_keeps_its_contents() -> None:
    """In a process of its own: what else this one has in use is anybody's guess."""
    ((collapsed, grown, is_kept),) = run_ranks(1, collapse_here)
    assert collapsed >= NUM_BYTES - 2 * 2 * MIB  # its ends are not aligned
    assert grown < NUM_BYTES
    assert is_kept


def test_it_ends_when_the_time_is_up() -> None:
    times = iter([0.0, 2.0])
    assert collapse(limit_s=1.0, clock=lambda: next(times)) == 0
    assert not list(times)


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_nothing_happens_where_huge_pages_are_off(tmp_path: Path, setting: str | None) -> None:
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    assert collapse(limit_s=60.0, settings=tmp_path) == 0
