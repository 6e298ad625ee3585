"""Disks of hosts that are nearly full, as the status names them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.controller.parts.recovery import Problem
from cluster.core.frames import LowDisk


def describe_low(disks: Iterable[tuple[str, LowDisk]]) -> list[str]:
    """For people, of (host, disk); a folder that several workers of a host report is in once."""
    least: dict[tuple[str, str], int] = {}
    for host, disk in disks:
        place = host, disk.folder
        least[place] = min(disk.free_bytes, least.get(place, disk.free_bytes))
    return [
        f"the disk of {folder} on {host} {Problem.NEARLY_FULL}: {free_bytes} bytes are free"
        for (host, folder), free_bytes in sorted(least.items())
    ]
