"""Readable names of a cluster's processes, and their CPU time."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil


def name_of(process: psutil.Process) -> str:
    """Name of a process: its actor class, module, script or program."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split(":")[0].split("(")[0].split(".")[0]
    scripts = [Path(w).stem for w in words if w.endswith(".py")]
    modules = [words[i + 1] for i, w in enumerate(words[:-1]) if w == "-m"]
    return (scripts or modules or [Path(words[0]).name])[0]


def cpu_seconds() -> dict[str, float]:
    """CPU seconds of this process (``client``) and of its descendants by name."""
    me = psutil.Process()
    used: defaultdict[str, float] = defaultdict(float)
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            used["client" if process == me else name_of(process)] += times.user + times.system
    return dict(used)
