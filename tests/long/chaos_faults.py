"""Faults and orders of the chaos: what happens to the cluster, and what the cluster says of it.

Each fault has a generator of its own, drawn from the seed and the fault's number, so that a seed
repeats faults, times and targets as far as the cluster is the same.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import httpx
import psutil

from benchmarks.harness.server import Served
from cluster.launch.orphans import find_by_files
from tests.long.chaos_clients import Seen

_STOP_S = (0.5, 4.0)
"""Shortest and longest time for which a process is stopped: the detection limit is 2 s."""
_MOST_WORKERS = 3
"""Of each role, that a scaling asks for."""
_CALM_S = 90.0
"""Time after the last fault in which the cluster must be whole."""
_LOST = re.compile(r"lost ([a-z]+-[0-9.]+): (.*)")
_NAME = re.compile(r"(attention|expert|gateway)-\w+(\.\d+)?")
_ORDERED = ("the cluster is scaled down", "the scaling was rolled back")
"""Reasons for which the controller itself ends new workers."""

_NOTHING_TO_HIT = (
    httpx.HTTPError,
    psutil.Error,
    ProcessLookupError,
    AssertionError,
    LookupError,  # none to choose from
    ValueError,  # fewer than two
)

Worker = dict[str, Any]


class Chaos:
    """What happens to one cluster."""

    def __init__(self, server: Served, seed: int, seen: Seen) -> None:
        self._server, self._seed, self._seen = server, seed, seen
        self._number = 0
        self._draw = random.Random(seed)
        self._hit: set[str] = set()
        self._events: dict[tuple[float, str], str] = {}
        self.done: Counter[str] = Counter()
        """By fault or order, and how it began."""
        self._faults: Sequence[tuple[int, Callable[[], None]]] = (
            (3, self._kill_worker),
            (1, self._kill_two_workers),
            (2, self._stop_worker),
            (1, self._end_worker),
            (1, self._kill_controller),
            (1, self._stop_controller),
            (1, self._kill_gateway),
            (4, self._scale),
            (2, self._drain),
            (2, self._rebalance),
        )

    def pause_s(self, mean_s: float) -> float:
        """Time until the next fault."""
        self._number += 1
        self._draw = random.Random(f"fault {self._number} of {self._seed}")
        return self._draw.expovariate(1.0 / mean_s)

    def one(self) -> None:
        """A fault or an order, drawn by lot; one that finds nothing to hit is left out."""
        ((_, fault),) = self._draw.choices(self._faults, [weight for weight, _ in self._faults])
        try:
            fault()
        except _NOTHING_TO_HIT:
            self.done[f"{fault.__name__.strip('_').replace('_', ' ')}: nothing to hit"] += 1

    def snapshot(self) -> dict[str, Any]:
        """The status, by any gateway; its events are kept."""
        status = self._server.status()
        for event in status["history"]:
            self._events[event["time"], event["cause"]] = event["effect"]
        return status

    def changes(self) -> Counter[str]:
        """Recoveries and other changes of the cluster, by their cause without numbers."""
        causes = (cause.partition(":")[0] for _, cause in self._events)
        return Counter(_NAME.sub(r"\1", cause) for cause in causes)

    def unexplained(self) -> list[str]:
        """Losses of workers that no fault has hit."""
        found = (_LOST.match(part) for _, cause in self._events for part in cause.split("; "))
        losses = [m for m in found if m is not None and m[1] not in self._hit]
        return sorted(m.group() for m in losses if not m[2].startswith(_ORDERED))

    def wait_calm(self) -> list[str]:
        """Wait until the cluster is whole and idle; what it lacks at the end of the time."""
        give_up, lacking = time.monotonic() + _CALM_S, ["no gateway answers"]
        while time.monotonic() < give_up:
            with suppress(httpx.HTTPError, AssertionError):
                if not (lacking := _lacking(self.snapshot())):
                    return []
            time.sleep(0.5)
        return lacking

    def operations(self) -> Counter[str]:
        """How the last operations have ended."""
        (gateway, *_) = self._gateways()
        found = httpx.get(f"http://{gateway}/admin/v1/operations", timeout=10.0).json()
        return Counter(f"{o['kind']} {o['state']}" for o in found["operations"])

    def _gateways(self) -> list[str]:
        """Where gateways take orders."""
        known = self.snapshot()["gateway"]
        return [gateway["admin_http"] for gateway in known if gateway.get("admin_http")]

    def _serving(self) -> list[Worker]:
        workers = self.snapshot()["workers"]
        found = [w for w in workers if w["state"] == "SERVING"]
        return sorted(found, key=lambda worker: str(worker["name"]))

    def _signal(self, what: str, worker: Worker, number: signal.Signals) -> None:
        self._hit.add(worker["name"])
        os.kill(worker["pid"], number)
        self.done[f"{what} {worker['role']} worker"] += 1

    def _stop(self, pid: int) -> None:
        """Stop a process for a while; returns at once."""
        os.kill(pid, signal.SIGSTOP)

        def go_on() -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        timer = threading.Timer(self._draw.uniform(*_STOP_S), go_on)
        timer.start()

    def _kill_worker(self) -> None:
        self._signal("kill -9 of an", self._draw.choice(self._serving()), signal.SIGKILL)

    def _kill_two_workers(self) -> None:
        for worker in self._draw.sample(self._serving(), 2):
            self._signal("kill -9, one of two, of an", worker, signal.SIGKILL)

    def _stop_worker(self) -> None:
        worker = self._draw.choice(self._serving())
        self._hit.add(worker["name"])
        self._stop(worker["pid"])
        self.done[f"SIGSTOP of an {worker['role']} worker"] += 1

    def _end_worker(self) -> None:
        """It drains itself."""
        self._signal("SIGTERM to an", self._draw.choice(self._serving()), signal.SIGTERM)

    def _kill_controller(self) -> None:
        os.kill(self._draw.choice(self._pids("ray::ControllerActor")), signal.SIGKILL)
        self.done["kill -9 of the controller"] += 1

    def _stop_controller(self) -> None:
        self._stop(self._draw.choice(self._pids("ray::ControllerActor")))
        self.done["SIGSTOP of the controller"] += 1

    def _kill_gateway(self) -> None:
        pid = self._draw.choice(self._pids("ray::ServeReplica"))
        self._seen.may_break()
        os.kill(pid, signal.SIGKILL)
        self.done["kill -9 of a gateway"] += 1

    def _pids(self, title: str) -> list[int]:
        """Processes of the cluster whose command line begins so."""
        found = [p.pid for p in find_by_files(self._server.folder)]
        return [p for p in found if "".join(psutil.Process(p).cmdline()[:1]).startswith(title)]

    def _order(self, what: str, body: dict[str, Any]) -> None:
        """Give an order to a gateway's admin port; ``operations`` tells how it ends."""
        url = f"http://{self._draw.choice(self._gateways())}/admin/v1/{what}"
        answer = httpx.post(url, json=body, timeout=10.0)
        how = "ordered" if answer.status_code == 200 else f"refused ({answer.status_code})"
        self.done[f"{what}: {how}"] += 1

    def _scale(self) -> None:
        counts = {
            role: self._draw.randint(1, _MOST_WORKERS)
            for role in self._draw.choice((("attention",), ("expert",), ("attention", "expert")))
        }
        self._order("scale", {**counts, "deadline_s": 60})

    def _drain(self) -> None:
        worker = self._draw.choice(self._serving())
        self._order("drain", {"worker": worker["name"], "deadline_s": 60})

    def _rebalance(self) -> None:
        self._order("rebalance", {})


def _lacking(snapshot: dict[str, Any]) -> list[str]:
    """What keeps a cluster from being whole and idle."""
    held = [
        f"{w['name']} holds {w['kv_blocks_total'] - w['kv_blocks_free']} KV blocks"
        for w in snapshot["workers"]
        if w["state"] == "SERVING" and w["kv_blocks_total"] != w["kv_blocks_free"]
    ]
    state = snapshot["state"]
    return held + ([] if state == "SERVING" else [f"the state is {state}"])
