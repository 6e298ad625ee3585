"""Worker processes that serve one cluster after the other, so that only the first start is slow.

``python -m tests.harness.worker_pool`` is one of them: each line of JSON on stdin is a worker to
be, and ``null`` ends it, which is answered with a line; the end of stdin ends the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.harness.serving_cluster import ThreadWorkerGroup
from cluster.core.topology import Member
from cluster.sizing.start_plan import StartPlan
from workers.process.worker.worker import Worker
from workers.process.worker_args import WorkerArgs

_LIMIT_S = 120.0


class PooledWorkerGroup(ThreadWorkerGroup):
    """``WorkerGroup`` for clusters one after the other. ``close`` ends the processes."""

    def __init__(self) -> None:
        super().__init__()
        self._busy: dict[str, subprocess.Popen[str]] = {}
        self._free: list[subprocess.Popen[str]] = []

    def names(self) -> list[str]:
        return list(self._busy)

    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        for member in members:
            child = self._free.pop() if self._free else _start_process()
            self._busy[member.name] = child
            _tell(child, plan.arguments(member, address))

    async def end(self, names: Sequence[str]) -> None:
        children = [self._busy.pop(name) for name in names if name in self._busy]
        for child in children:
            _tell(child, None)
        for child in children:
            assert child.stdout is not None
            line = await asyncio.wait_for(asyncio.to_thread(child.stdout.readline), _LIMIT_S)
            if line:
                self._free.append(child)
            else:
                child.kill()
                child.communicate()

    def close(self) -> None:
        """End all processes."""
        for child in [*self._free, *self._busy.values()]:
            try:
                child.communicate(timeout=_LIMIT_S)
            finally:
                child.kill()
        self._free, self._busy = [], {}


def _start_process() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.harness.worker_pool"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _tell(child: subprocess.Popen[str], message: object) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(message) + "\n")
    child.stdin.flush()


def main() -> None:
    """One process: worker after worker."""
    import torch

    torch.set_num_threads(1)
    worker: Worker | None = None
    for line in sys.stdin:
        message = json.loads(line)
        if worker is not None:
            worker.stop()
            worker = None
        if message is None:
            sys.stdout.write("stopped\n")
            sys.stdout.flush()
            continue
        config, member, control_address, extra = message
        args = WorkerArgs.from_plain(config, member, control_address, extra, "127.0.0.1")
        worker = Worker(args, lambda reason: os._exit(1))
        worker.start()
    if worker is not None:
        worker.stop()


if __name__ == "__main__":
    main()
