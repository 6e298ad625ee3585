"""What a cluster on this machine holds, asked from the system and from Ray, never from itself.

    before = settled()
    ...
    assert before.differences(settled(like=before)) == []

Memory is apart (``own_memory``): it is never equal twice.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil
from ray._private import state
from ray.util.placement_group import placement_group_table

from benchmarks.harness.processes import name_of
from benchmarks.harness.worker_processes import sizes

_SETTLE_S = 45.0
"""Longest time in which Ray and the kernel give back what has ended."""
_LOOK_S = 0.5
_NOT_OURS = ("IDLE", "ray_process_reaper", "log_monitor")
"""Ray keeps idle processes for later actors, as many as it likes; its log monitor has files of
ended workers open, up to 200, where the launcher's environment does not forbid it."""


RAYS_OWN = ("gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent", "dashboard", "monitor")
"""Processes with no code of ours."""
_CALLS_RAY = (*RAYS_OWN, "ControllerActor")
"""With this process itself, those in which Ray's own clients and servers work all the time."""
_POOL_THREADS = 8
_POOL_DESCRIPTORS = 4
"""What pools of gRPC may add there in all: they follow its load. One of each cycle is more."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one process holds."""

    descriptors: int
    threads: int
    listening: int
    """Sockets that listen for connections."""


@dataclass(frozen=True, slots=True)
class Census:
    """Everything that is counted. Processes are by pid and name: those that stay must be equal."""

    processes: dict[tuple[int, str], Held]
    actors: tuple[str, ...]
    """Names of Ray's living actors."""
    groups: int
    """Placement groups that are not removed."""
    shared_memory: tuple[str, ...]
    """Files in ``/dev/shm``."""

    def differences(self, other: Census) -> list[str]:
        """What differs in ``other``, for people."""
        found = [
            f"{name} ({pid}): {self.processes.get((pid, name))} -> {held}"
            for (pid, name), held in other.processes.items()
            if not _is_same(pid, name, self.processes.get((pid, name)), held)
        ]
        gone = self.processes.keys() - other.processes.keys()
        found += [f"{name} ({pid}) is gone" for pid, name in gone]
        for what in ("actors", "groups", "shared_memory"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                found.append(f"{what}: {mine} -> {theirs}")
        return found


def _is_same(pid: int, name: str, before: Held | None, now: Held) -> bool:
    if before is None or (name not in _CALLS_RAY and pid != os.getpid()):
        return before == now
    return (
        before.listening == now.listening
        and now.threads - before.threads <= _POOL_THREADS
        and now.descriptors - before.descriptors <= _POOL_DESCRIPTORS
    )


def take_census() -> Census:
    """Count now; Ray is the one that this process is connected to."""
    alive = [a for a in state.actors().values() if a["State"] != "DEAD"]
    groups = placement_group_table().values()
    return Census(
        processes={(p.pid, name): held for p, name in own_processes() if (held := held_by(p))},
        actors=tuple(sorted(str(a["Name"] or a["ActorClassName"]) for a in alive)),
        groups=sum(group["state"] != "REMOVED" for group in groups),
        shared_memory=tuple(sorted(os.listdir("/dev/shm"))),
    )


def own_processes() -> list[tuple[psutil.Process, str]]:
    """This process and all below it, but for those that Ray keeps idle, with their names."""
    me = psutil.Process()
    found = []
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.Error):
            name = name_of(process)
            if process.status() != psutil.STATUS_ZOMBIE and name not in _NOT_OURS:
                found.append((process, name))
    return found


def held_by(process: psutil.Process) -> Held | None:
    """What a process holds; None if it has ended."""
    try:
        listening = [c for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        return Held(process.num_fds(), process.num_threads(), len(listening))
    except psutil.Error:
        return None


def settled(like: Census | None = None) -> Census:
    """A census in which nothing differs from ``like``, or from the one before; or the last one."""
    deadline = time.monotonic() + _SETTLE_S
    before, now = like, take_census()
    while (before is None or before.differences(now)) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        before, now = like or now, take_census()
    return now


def own_memory() -> dict[tuple[int, str], float]:
    """MiB of anonymous memory of each process below this one; this one remembers the test.

    The unique set size would not do: pages of libraries become a process's own when others end.
    """
    found = {}
    for process, name in own_processes()[1:]:
        with suppress(OSError, KeyError):  # it has ended, and may wait for its parent
            found[process.pid, name] = sizes(process.pid)["RssAnon"] / 2**20
    return found
