"""What ``doctor`` says about the limits of a host, and how to mend it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from cluster.cli.offline.host_limits import (
    MIN_FILES,
    MIN_THREADS,
    examine_disk,
    examine_files,
    examine_huge_pages,
    examine_threads,
)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "folder"),
    [("0::/a/b\n", "sys/fs/cgroup/a"), ("3:cpu:/x\n2:pids:/a/b\n", "sys/fs/cgroup/pids/a/b")],
    ids=["version 2, a group above", "version 1"],
)
def test_the_control_group_counts(tmp_path: Path, groups: str, folder: str) -> None:
    write(tmp_path, "proc/sys/kernel/threads-max", str(10**9))
    write(tmp_path, "proc/self/cgroup", groups)
    write(tmp_path, f"{folder}/pids.current", "30")
    write(tmp_path, f"{folder}/pids.max", "50")
    found = examine_threads(tmp_path)
    assert found.verdict == "warn"
    assert "20 more may start, limited by pids.max of the control group: raise" in found.text
    write(tmp_path, f"{folder}/pids.max", "max\n")
    assert "pids.max" not in examine_threads(tmp_path).text


def test_the_kernel_has_a_limit(tmp_path: Path) -> None:
    write(tmp_path, "proc/sys/kernel/threads-max", str(MIN_THREADS))
    assert examine_threads(tmp_path).verdict == "warn"


def test_few_open_files() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MIN_FILES - 1, limits[1]))
    try:
        found = examine_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found.verdict == "warn"
    assert found.text.startswith(f"{MIN_FILES - 1} for each process: run ulimit -n ")


def test_a_hard_limit_is_not_to_be_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(soft: int, hard: int) -> str:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        return examine_files().text

    assert "run ulimit -n 8192 before the start" in limit(1024, 8192)
    assert "the hard limit is 2048, so that ulimit cannot raise it to 4096" in limit(1024, 2048)


@pytest.mark.parametrize(
    ("setting", "verdict", "text"),
    [
        ("always [madvise] never", "ok", "transparent huge pages: madvise"),
        ("always madvise [never]", "warn", "echo madvise > /sys/"),
        (None, "ok", "this system has none"),
    ],
)
def test_huge_pages(tmp_path: Path, setting: str | None, verdict: str, text: str) -> None:
    if setting is not None:
        write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", setting)
    found = examine_huge_pages(tmp_path)
    assert found.verdict == verdict
    assert text in found.text


def test_the_disk_of_the_logs() -> None:
    assert " GB free in /tmp" in examine_disk().text
