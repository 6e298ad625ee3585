"""Checks of this host's limits: threads, open files, huge pages, disk."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.cli.offline.finding import Finding, make_finding
from cluster.core.errors import StartError
from cluster.launch.local_ray import temp_base

MIN_THREADS = 1000
"""Minimum number of further threads that must be allowed: the demo has about 400 on 2 cores."""
MIN_FILES = 4096
"""Minimum limit of open files per process: a gateway has about 80, and one per waiting request."""
RECOMMENDED_FILES = 65536
"""Recommended limit of open files if this host's limit is below ``MIN_FILES``."""
MIN_FREE_SHARE = 0.05
"""Minimum free share of a disk, below which Ray writes no objects to it.

Source: Ray's ``local_fs_capacity_threshold``.
"""
_REMEDIES = {
    "/proc/sys/kernel/threads-max": "as root: sysctl kernel.threads-max",
    "ulimit -u": "docker run --ulimit nproc, systemd's LimitNPROC, limits.conf",
}
_HUGE_PAGES = Path("sys/kernel/mm/transparent_hugepage/enabled")


def examine_threads(root: Path = Path("/")) -> Finding:
    """Check how many threads the kernel, the user's limit and the control groups still allow."""
    running = list(_threads())
    free = {
        "/proc/sys/kernel/threads-max": _kernel_threads(root, running),
        "ulimit -u": _user_threads(running),
        "pids.max of the control group": _group_threads(root),
    }
    known = {name: number for name, number in free.items() if number is not None}
    if not known:
        return make_finding("threads", True, "no limit")
    name, number = min(known.items(), key=lambda pair: pair[1])
    text = f"{max(number, 0)} more may start, limited by {name}"
    fix = f"raise {name} ({_REMEDIES.get(name, 'docker run --pids-limit, or systemd TasksMax')})"
    return make_finding("threads", number >= MIN_THREADS, text, fix=fix, otherwise="warn")


def _kernel_threads(root: Path, running: Iterable[tuple[int, int]]) -> int | None:
    limit = _number(root / "proc/sys/kernel/threads-max")
    return None if limit is None else limit - sum(number for _, number in running)


def _user_threads(running: Iterable[tuple[int, int]]) -> int | None:
    """Return how many threads the user's limit still allows; None for root or without a limit."""
    limit, user = resource.getrlimit(resource.RLIMIT_NPROC)[0], os.getuid()
    if user == 0 or limit == resource.RLIM_INFINITY:
        return None
    return limit - sum(number for owner, number in running if owner == user)


def _threads() -> Iterator[tuple[int, int]]:
    """Yield user id and number of threads of each visible process."""
    import psutil

    for process in psutil.process_iter(["num_threads", "uids"]):
        if process.info["num_threads"] and process.info["uids"]:
            yield process.info["uids"].real, process.info["num_threads"]


def _group_threads(root: Path) -> int | None:
    """Return how many threads the control group and its ancestors still allow; None: no limit.

    Source: cgroups(7).
    """
    free = []
    for folder in _groups(root):
        limit, used = _number(folder / "pids.max"), _number(folder / "pids.current")
        if limit is not None and used is not None:
            free.append(limit - used)
    return min(free, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Yield folders of the control groups that limit this process, for cgroups v1 and v2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "pids" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("pids" if controllers else "")
        own = top / path.lstrip("/")
        yield from (own, *(parent for parent in own.parents if parent.is_relative_to(top)))


def _number(path: Path) -> int | None:
    """Return the number in a kernel file; None if there is no file or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def examine_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} for each process"
    is_ok = soft == resource.RLIM_INFINITY or soft >= MIN_FILES
    wanted = RECOMMENDED_FILES if hard == resource.RLIM_INFINITY else min(RECOMMENDED_FILES, hard)
    fix = f"run ulimit -n {wanted} before the start"
    if wanted < MIN_FILES:
        fix = (
            f"the hard limit is {hard}, so that ulimit cannot raise it to {MIN_FILES}: raise that "
            "limit (docker run --ulimit nofile=65536, systemd's LimitNOFILE, limits.conf)"
        )
    return make_finding("open files", is_ok, text, fix=fix, otherwise="warn")


def examine_huge_pages(root: Path = Path("/")) -> Finding:
    """Check huge pages, which speed up small batches because these are memory-bound.

    See ``workers.model.huge_pages``.
    """
    path = root / _HUGE_PAGES
    try:
        found = re.search(r"\[(\w+)\]", path.read_text())
    except OSError:
        found = None
    if found is None:
        return make_finding("huge pages", True, "this system has none: small batches are slower")
    is_on = found[1] != "never"
    fix = f"decode steps of small batches are slower; as root: echo madvise > /{_HUGE_PAGES}"
    return make_finding(
        "huge pages", is_on, f"transparent huge pages: {found[1]}", fix=fix, otherwise="warn"
    )


def examine_disk() -> Finding:
    try:
        folder = temp_base()
    except StartError as err:
        return make_finding("disk", False, str(err))
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / 1e9:.1f} GB free in {folder}, where Ray has its logs and objects"
    is_ok = usage.free >= MIN_FREE_SHARE * usage.total
    fix = f"free {MIN_FREE_SHARE:.0%} of the disk"
    return make_finding("disk", is_ok, text, fix=fix, otherwise="warn")
