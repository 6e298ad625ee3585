"""A cluster of processes on this host, with the faults of ``tests.long.reliability``."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from benchmarks.faults.load import wait
from benchmarks.harness.serving_cluster import RayCluster
from cluster.core.fleets import NAMESPACE

_AT_BYTES = 0.5
"""Position of a change in a file, as a fraction of its size: in the weights, after the header."""


class Site:
    """The cluster of one row of the table, with methods that cause faults."""

    def __init__(self, cluster: RayCluster, draw: random.Random) -> None:
        self.cluster = cluster
        self._draw = draw
        self._stopped: list[int] = []
        self._changed: list[tuple[Path, bytes, os.stat_result]] = []
        self._second: subprocess.Popen[str] | None = None

    def snapshot(self) -> dict[str, Any]:
        """Snapshot of the controller; waits until a controller replies."""
        while True:
            try:
                return self.cluster.snapshot()
            except RayError:  # it is being restarted
                time.sleep(0.02)

    def names(self, role: str, count: int = 1) -> list[str]:
        """Random serving workers of a role."""
        workers = self.snapshot()["workers"]
        found = [w["name"] for w in workers if w["role"] == role and w["state"] == "SERVING"]
        return self._draw.sample(sorted(found), count)

    def signal(self, names: Sequence[str], number: signal.Signals) -> None:
        """Send a signal to the processes of workers."""
        pids = {w["name"]: w["pid"] for w in self.snapshot()["workers"]}
        for name in names:
            os.kill(pids[name], number)
            if number is signal.SIGSTOP:
                self._stopped.append(pids[name])

    def kill_controller(self) -> None:
        """Send SIGKILL to the controller's process."""
        os.kill(self.snapshot()["controller_pid"], signal.SIGKILL)

    def freeze_controller(self, seconds: float) -> None:
        """Stop the controller's process for a time."""
        pid = self.snapshot()["controller_pid"]
        os.kill(pid, signal.SIGSTOP)
        self._stopped.append(pid)
        threading.Timer(seconds, self.wake).start()

    def arm(self, frame: str, is_sent: bool) -> None:
        """Call ``PhaseWorker.arm`` on all serving workers."""
        snapshot = self.snapshot()
        for worker in snapshot["workers"]:
            if worker["state"] == "SERVING":
                actor: Any = ray.get_actor(worker["name"], namespace=NAMESPACE)
                ray.get(actor.arm.remote(frame, is_sent, snapshot["controller_pid"]))

    def rebalance(self) -> None:
        """Start a rebalance when its plan moves experts; the controller may be killed in it."""
        with contextlib.suppress(RayError):
            wait(self._rebalances, "a rebalancing that moves experts")

    def _rebalances(self) -> bool:
        """Start a rebalance if its plan moves experts; other plans only change split weights."""
        plan = ray.get(self.cluster.actor.begin.remote("rebalance", {"dry_run": True}))
        if plan["result"]["action"] != "move":
            return False
        begun = ray.get(self.cluster.actor.begin.remote("rebalance", {}))
        return bool(begun["state"] == "RUNNING")

    def change_checkpoint(self) -> None:
        """Change weights in the files that the workers have read, until ``wake``."""
        for path in Path(self.cluster.config.model.path).glob("*.safetensors"):
            was, at = path.stat(), int(path.stat().st_size * _AT_BYTES)
            with path.open("r+b") as file:
                file.seek(at)
                before = file.read(4096)
                file.seek(at)
                file.write(bytes(b ^ 0xFF for b in before))
            self._changed.append((path, before, was))

    def start_second_gateway(self) -> None:
        """Start a second gateway with clients; returns when the clients get tokens."""
        self._second = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.second_gateway"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._second.stdin is not None
        assert self._second.stdout is not None
        given = {"config": self.cluster.config.to_dict(), "snapshot": self.snapshot()}
        self._second.stdin.write(json.dumps(given) + "\n")
        self._second.stdin.flush()
        if self._second.stdout.readline() != "flowing\n":
            raise RuntimeError("the second gateway does not serve")

    def kill_second_gateway(self) -> None:
        """Send SIGKILL to the second gateway."""
        assert self._second is not None
        self._second.kill()
        self._second.communicate()

    def drain(self, name: str) -> None:
        """Start a drain and wait until it has ended."""
        begun = self.cluster.call("begin", "drain", {"worker": name, "limit_s": 60.0})
        find = self.cluster.call
        wait(lambda: find("operation", begun["id"])["state"] != "RUNNING", "the end of a drain")
        ended = find("operation", begun["id"])
        if ended["state"] != "SUCCEEDED":
            raise RuntimeError(str(ended["message"]))

    def close(self) -> None:
        """End all processes and restore all files."""
        self.wake()
        if self._second is not None and self._second.poll() is None:
            self.kill_second_gateway()

    def wake(self) -> None:
        """Continue stopped processes and restore changed files."""
        while self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._stopped.pop(), signal.SIGCONT)
        while self._changed:
            path, before, was = self._changed.pop()
            with path.open("r+b") as file:
                file.seek(int(was.st_size * _AT_BYTES))
                file.write(before)
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
