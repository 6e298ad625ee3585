"""Workers as processes without Ray around them, held after their imports until the test goes on.

The parent reads what their memory comes to. ``python -m benchmarks.harness.worker_processes`` is
one worker: a line of JSON on stdin starts it, the end of stdin ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.serving_cluster import ThreadWorkerGroup
from cluster.core.topology import Member
from cluster.sizing.start_plan import StartPlan

SAMPLE_EVERY_S = 0.002
_LIMIT_S = 240.0


@dataclass(slots=True)
class Memory:
    """Anonymous memory of one worker, in bytes."""

    base: int
    """After its imports."""
    peak: int
    """Most that was seen from then on."""
    mapped: int = 0
    """Most memory of mapped files that was seen."""
    end: int = 0
    """When watching ended."""

    def look(self, fields: Mapping[str, int]) -> None:
        """Take a look at ``/proc/PID/status`` in."""
        self.end = fields["RssAnon"]
        self.peak = max(self.peak, self.end)
        self.mapped = max(self.mapped, fields["RssFile"] + fields["RssShmem"])
        # At its largest (the kernel misses no moment) the process had at least so much of its own.
        self.peak = max(self.peak, fields["VmHWM"] - self.mapped)


class ProcessWorkerGroup(ThreadWorkerGroup):
    """``WorkerGroup`` whose workers are processes, watched from their imports on."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[str, Memory] = {}
        """By worker; complete once ``finish_watching`` was called."""
        self._children: dict[str, subprocess.Popen[str]] = {}
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch_memory, daemon=True)

    def names(self) -> list[str]:
        return list(self._children)

    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        for member in members:
            self._children[member.name] = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.harness.worker_processes", member.role],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        for name, child in self._children.items():
            await asyncio.wait_for(asyncio.to_thread(_wait_imported, child), _LIMIT_S)
            Path(f"/proc/{child.pid}/clear_refs").write_text("5")  # VmHWM begins anew
            base = sizes(child.pid)["RssAnon"]
            self.memory[name] = Memory(base=base, peak=base)
        self._watcher.start()
        for member in members:
            stdin = self._children[member.name].stdin
            assert stdin is not None
            stdin.write(json.dumps(plan.arguments(member, address)) + "\n")
            stdin.flush()

    async def end(self, names: Sequence[str]) -> None:
        children = [self._children.pop(name) for name in names if name in self._children]
        await asyncio.gather(*(asyncio.to_thread(_end, child) for child in children))

    def finish_watching(self) -> dict[str, Memory]:
        """Stop the watch; what every worker's memory came to."""
        self._stop.set()
        self._watcher.join(_LIMIT_S)
        self._look()
        return self.memory

    def _watch_memory(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self._look()

    def _look(self) -> None:
        for name, child in list(self._children.items()):
            self.memory[name].look(sizes(child.pid))


def sizes(pid: int) -> dict[str, int]:
    """The sizes in ``/proc/PID/status``, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in words}


def _wait_imported(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    with child.stdout as stdout:
        assert stdout.readline() == "imported\n"


def _end(child: subprocess.Popen[str]) -> None:
    try:
        child.communicate(timeout=_LIMIT_S)
    finally:
        child.kill()
        child.wait()


def main() -> None:
    """One worker: import, say so, wait for its arguments, run until stdin ends."""
    from workers.process.worker.worker import Worker
    from workers.process.worker_args import WorkerArgs

    sys.stdout.write("imported\n")
    sys.stdout.flush()
    config, member, control_address, extra = json.loads(sys.stdin.readline())
    args = WorkerArgs.from_plain(config, member, control_address, extra, "127.0.0.1")
    worker = Worker(args, lambda reason: os._exit(1))
    worker.start()
    sys.stdin.read()
    worker.stop()


if __name__ == "__main__":
    main()
