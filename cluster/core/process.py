"""Processes of a host: their identities, ends and priorities.

A process is identified by process id and start time, as the system reuses process ids.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

_POLL_S = 0.02
_LOW_PRIORITY = 15
"""Nice value of what others should not wait for, which gets a thirtieth of a busy CPU: Linux gives
nice 15 the weight 36 and nice 0 the weight 1024 (``sched_prio_to_weight`` in
kernel/sched/core.c)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessIdentity:
    """Process id and start time, which together identify one process of a host."""

    pid: int
    started_at: float
    """Start time in seconds since 1970, as the kernel reports it."""


def describe_self() -> ProcessIdentity:
    """Return the identity of the calling process."""
    return ProcessIdentity(pid=os.getpid(), started_at=psutil.Process().create_time())


def is_running(process: ProcessIdentity) -> bool:
    """Return whether the process still runs. A zombie does not count as running."""
    try:
        found = psutil.Process(process.pid)
        same = abs(found.create_time() - process.started_at) < 1.0
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_process(process: ProcessIdentity) -> None:
    """Send SIGKILL to a process, even if it is stopped. Do nothing if the process has ended."""
    if is_running(process):
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.kill(process.pid, signal.SIGKILL)


def wait_gone(process: ProcessIdentity, limit_s: float) -> bool:
    """Wait until the process has ended; return False if it still runs after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while is_running(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def count_cpus() -> int:
    """Return the number of cores that this process may use, at least 1, within its CPU affinity and
    the CPU quota of its cgroup."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no limit
    return max(1, cores)


def yield_cpus_to_others(pid: int) -> None:
    """Give a process, or a thread by its native id, a low priority among users of the CPUs.

    That cannot be undone without privileges.
    """
    with contextlib.suppress(OSError):  # it has ended, or may not be changed
        os.setpriority(os.PRIO_PROCESS, pid, _LOW_PRIORITY)


def import_at_low_priority(module: str) -> None:
    """Import a module in a thread of its own, with a low priority. Raises its errors."""

    def work() -> None:
        yield_cpus_to_others(threading.get_native_id())
        importlib.import_module(module)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
