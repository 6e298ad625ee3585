"""Records nearly full disks of hosts, which the status shows. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.core.frames import LowDisk

NEARLY_FULL = "is nearly full"
"""Words with which the status reports a nearly full disk."""


def differ(before: Iterable[LowDisk], now: Iterable[LowDisk]) -> bool:
    """Return whether two reports of nearly full disks name different folders.

    Changes of the free bytes are ignored, so that they cause no update to gateways.
    """
    return {disk.folder for disk in before} != {disk.folder for disk in now}


class HostDisks:
    """Nearly full disks that gateways and the controller's own process report.

    The disks that workers report are not included (``WorkerRecord.low_disks``).
    """

    def __init__(self) -> None:
        self._disks: dict[str, list[tuple[str, LowDisk]]] = {}

    def report(self, low_disks: Iterable[LowDisk], host: str, reporter: str) -> bool:
        """Record a report of nearly full disks; return whether the folders have changed.

        ``reporter`` is a gateway, or empty for the controller's own process. A report replaces the
        last report of the same reporter.
        """
        found, before = tuple(low_disks), self._disks.pop(reporter, [])
        if found:
            self._disks[reporter] = [(host, disk) for disk in found]
        return differ((disk for _, disk in before), found)

    def reported(self) -> list[tuple[str, LowDisk]]:
        """Return (host, disk) of all nearly full disks in the newest reports."""
        return [entry for disks in self._disks.values() for entry in disks]


def describe_low(disks: Iterable[tuple[str, LowDisk]]) -> list[str]:
    """Describe (host, disk) pairs to operators, with one text for each folder of a host."""
    least: dict[tuple[str, str], int] = {}
    for host, disk in disks:
        where = host, disk.folder
        least[where] = min(disk.free_bytes, least.get(where, disk.free_bytes))
    return [
        f"the disk of {folder} on {host} {NEARLY_FULL}: {free_bytes >> 20} MiB are free"
        for (host, folder), free_bytes in sorted(least.items())
    ]
