"""Finds and kills the processes that a killed cluster left running."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from cluster.core.process import ProcessIdentity, is_running, kill_process

_POLL_S = 0.05
_END_LIMIT_S = 3.0


def identify(pid: int) -> ProcessIdentity | None:
    """Return the identity of the process that has this pid now; None if there is none."""
    try:
        return ProcessIdentity(pid=pid, started_at=psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def host_id() -> str:
    """Return an identifier of this host and its process table, within which pids are valid."""
    try:
        table = os.readlink("/proc/self/ns/pid")
    except OSError:
        table = ""
    return f"{os.uname().nodename} {table}".strip()


def find_by_files(folder: Path) -> list[ProcessIdentity]:
    """Find this user's processes that have a file below ``folder`` open or in their arguments.

    Every process of a private Ray writes its log below Ray's folder, even one that has replaced its
    command line and environment by a title. The calling process is left out.
    """
    prefix = f"{folder}/"
    pids = [
        p.pid for p in psutil.process_iter() if p.pid != os.getpid() and _uses_folder(p, prefix)
    ]
    return [found for pid in pids if (found := identify(pid)) is not None]


def _uses_folder(process: psutil.Process, prefix: str) -> bool:
    try:
        if any(prefix in argument for argument in process.cmdline()):
            return True
        return any(file.path.startswith(prefix) for file in process.open_files())
    except (psutil.Error, OSError):
        return False  # it has ended, or belongs to another user


def end_all(processes: Iterable[ProcessIdentity], timeout_s: float) -> list[ProcessIdentity]:
    """Kill the processes; return the processes that still run after ``timeout_s`` seconds."""
    running = [p for p in processes if is_running(p)]
    for process in running:
        kill_process(process)
    deadline = time.monotonic() + timeout_s
    while running and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        running = [p for p in running if is_running(p)]
    return running


def end_private_ray(folder: Path, recorded: Sequence[ProcessIdentity]) -> int:
    """End the remaining processes of a private Ray, and remove its folder.

    Returns the number of processes. ``recorded``: processes from the cluster's state file. Two
    rounds are needed because a dying raylet may still start a worker.
    """
    ended = 0
    for _ in range(2):
        left = {p.pid: p for p in [*recorded, *find_by_files(folder)] if is_running(p)}
        end_all(left.values(), _END_LIMIT_S)
        ended += len(left)
    shutil.rmtree(folder, ignore_errors=True)
    return ended
