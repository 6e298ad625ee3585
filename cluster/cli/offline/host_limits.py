"""What the system allows the processes of this host: threads, files, huge pages, disk."""

from __future__ import annotations

import re
import resource
import shutil
from pathlib import Path

from cluster.cli.offline.finding import Finding, finding
from cluster.core.errors import StartError
from cluster.launch.local_ray import temp_base

MIN_THREADS = 1000
"""The demo's processes have about 400 on 2 cores; many pools grow with the cores."""
MIN_FILES = 4096
"""A gateway has about 80 files and a connection for each request, of which 1,024 may wait."""
MIN_FREE_SHARE = 0.05
"""Below it Ray no longer writes objects to disk. Source: ``local_fs_capacity_threshold`` of Ray."""
_HUGE_PAGES = Path("sys/kernel/mm/transparent_hugepage/enabled")


def examine_threads(root: Path = Path("/")) -> Finding:
    """The least of what the user, the kernel and the control group may still start."""
    import psutil

    used = sum(p.info["num_threads"] or 0 for p in psutil.process_iter(["num_threads"]))
    limits = {
        "ulimit -u": resource.getrlimit(resource.RLIMIT_NPROC)[0],
        "/proc/sys/kernel/threads-max": _number(root / "proc/sys/kernel/threads-max"),
        "pids.max of the control group": _number(root / "sys/fs/cgroup/pids.max"),
    }
    known = {name: limit for name, limit in limits.items() if limit is not None and limit >= 0}
    if not known:
        return finding("threads", True, f"{used} run, no limit")
    name, limit = min(known.items(), key=lambda pair: pair[1])
    free = limit - used
    text = f"{max(free, 0)} more may start ({name} is {limit})"
    fix = f"raise {name} (docker run --pids-limit, or systemd's TasksMax)"
    return finding("threads", free >= MIN_THREADS, text, fix, "warn")


def _number(path: Path) -> int | None:
    """What a file of the kernel says; None without a file or a limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def examine_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} for each process"
    is_ok = soft == resource.RLIM_INFINITY or soft >= MIN_FILES
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    fix = f"run ulimit -n {max(MIN_FILES, 65536)} before the start (at most {most} here)"
    return finding("open files", is_ok, text, fix, "warn")


def examine_huge_pages(root: Path = Path("/")) -> Finding:
    """Small batches are bound by memory: see ``workers.model.huge_pages``."""
    path = root / _HUGE_PAGES
    try:
        found = re.search(r"\[(\w+)\]", path.read_text())
    except OSError:
        found = None
    if found is None:
        return finding("huge pages", True, "this system has none: small batches are slower")
    is_on = found[1] != "never"
    fix = f"decode steps of small batches are slower; as root: echo madvise > /{_HUGE_PAGES}"
    return finding("huge pages", is_on, f"transparent huge pages: {found[1]}", fix, "warn")


def examine_disk() -> Finding:
    try:
        folder = temp_base()
    except StartError as err:
        return finding("disk", False, str(err))
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / 1e9:.1f} GB free in {folder}, where Ray has its logs and objects"
    is_ok = usage.free >= MIN_FREE_SHARE * usage.total
    return finding("disk", is_ok, text, f"free {MIN_FREE_SHARE:.0%} of the disk", "warn")
