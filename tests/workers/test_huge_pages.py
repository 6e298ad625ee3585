"""Huge pages: memory in use is collapsed and keeps its contents, the rest stays untouched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from workers import huge_pages
from workers.huge_pages import collapse

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


@pytest.mark.skipif(not system_collapses(), reason="the system has no MADV_COLLAPSE")
def test_memory_in_use_is_collapsed_and_keeps_its_contents() -> None:
    used = torch.arange(NUM_BYTES // 8)
    empty = torch.empty(8 * NUM_BYTES, dtype=torch.uint8)  # no page of it was touched
    before = anonymous_bytes()
    assert collapse(limit_s=60.0) >= NUM_BYTES - 2 * 2 * MIB  # its ends are not aligned
    assert anonymous_bytes() - before < NUM_BYTES
    assert torch.equal(used, torch.arange(NUM_BYTES // 8))
    del empty


def test_it_ends_when_the_time_is_up() -> None:
    times = iter([0.0, 2.0])
    assert collapse(limit_s=1.0, clock=lambda: next(times)) == 0
    assert not list(times)


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_nothing_happens_where_huge_pages_are_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    assert collapse(limit_s=60.0) == 0
