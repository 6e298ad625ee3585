"""What a cluster on this machine holds, asked from the system and from Ray, never from itself.

    before = settled()
    ...
    assert before.differences(settled(like=before)) == []

Memory is apart (``unique_memory``): it is never equal twice.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil
from ray._private import state
from ray.util.placement_group import placement_group_table

from benchmarks.processes import name_of

_SETTLE_S = 45.0
"""Longest time in which Ray and the kernel give back what has ended."""
_LOOK_S = 0.5
_NOT_OURS = ("IDLE", "ray_process_reaper", "log_monitor")
"""Ray keeps idle processes for later actors, as many as it likes; its log monitor has files of
ended workers open, up to 200, where the launcher's environment does not forbid it."""


_RAYS_OWN = ("gcs_server", "raylet")
_POOL_THREADS = 8
"""Threads that the pools of gRPC in Ray's own processes may add: they follow its load, not ours."""


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
            if not _is_same(name, self.processes.get((pid, name)), held)
        ]
        gone = self.processes.keys() - other.processes.keys()
        found += [f"{name} ({pid}) is gone" for pid, name in gone]
        for what in ("actors", "groups", "shared_memory"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                found.append(f"{what}: {mine} -> {theirs}")
        return found


def _is_same(name: str, before: Held | None, now: Held) -> bool:
    if before is None or name not in _RAYS_OWN:
        return before == now
    added = now.threads - before.threads
    return replace(before, threads=now.threads) == now and added <= _POOL_THREADS


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


def unique_memory() -> dict[tuple[int, str], float]:
    """MiB that each process below this one has for itself; this one remembers the test."""
    found = {}
    for process, name in own_processes()[1:]:
        with suppress(psutil.Error):
            found[process.pid, name] = process.memory_full_info().uss / 2**20
    return found
