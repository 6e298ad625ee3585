"""100,000 spoilt inputs to a served cluster: ``python -m tests.long.fuzz [--inputs N]``.

HTTP bodies and headers, gRPC messages, and the control, data and engine sockets. Wrong are an
answer 5xx (INTERNAL, UNKNOWN, UNAVAILABLE), no answer within a minute, a part that ends or is
restarted, a request or KV block that stays, another answer to a good request, and memory or
descriptors that grow with the inputs.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.server import GOOD, Served, running_server
from benchmarks.report.results import table
from cluster.launch.orphans import find_by_files
from tests.long import fuzz_limits
from tests.long.fuzz_inputs import Mutator
from tests.long.fuzz_surfaces import OUTCOMES, Outcome, Surface, Target, surfaces

NUM_INPUTS = 100_000
QUICK_INPUTS = 400
NUM_THREADS = 6
MAX_EXAMPLES = 10
"""Wrong results that are kept."""
MAX_GROWTH = 0.10
"""Share by which the cluster's memory may grow from the first to the second half."""


@dataclass(slots=True)
class Tally:
    """What came of the inputs."""

    counts: dict[str, collections.Counter[Outcome]] = field(default_factory=dict)
    """Outcomes by surface."""
    examples: list[str] = field(default_factory=list)
    """Some that are wrong."""
    seconds: float = 0.0
    """Time that it took."""

    @property
    def num_inputs(self) -> int:
        """All inputs."""
        return sum(sum(counter.values()) for counter in self.counts.values())

    @property
    def num_wrong(self) -> int:
        """Those that failed or hung."""
        return sum(c["failed"] + c["hung"] for c in self.counts.values())

    def add(self, other: Tally) -> None:
        """Count another run too."""
        for name, counter in other.counts.items():
            self.counts.setdefault(name, collections.Counter()).update(counter)
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]
        self.seconds += other.seconds


def fuzz(target: Target, num_inputs: int, seed: str, num_threads: int = NUM_THREADS) -> Tally:
    """Send so many inputs, from several threads; each thread's are always the same for a seed."""
    tally, lock = Tally(), threading.Lock()
    started = time.monotonic()

    def work(name: str, number: int, count: int) -> None:
        surface: Surface = surfaces(target)[name][1]()
        mutator = Mutator(f"{seed}/{name}/{number}")
        try:
            for _ in range(count):
                result = surface.send(mutator)
                with lock:
                    tally.counts[name][result.outcome] += 1
                    is_wrong = result.outcome in ("failed", "hung")
                    if is_wrong and len(tally.examples) < MAX_EXAMPLES:
                        tally.examples.append(f"{name}: {result.outcome}: {result.what}")
        finally:
            surface.close()

    with ThreadPoolExecutor(num_threads) as pool:
        futures = []
        for name, (percent, _) in surfaces(target).items():
            tally.counts[name] = collections.Counter()
            share = num_inputs * percent // 100
            for number in range(num_threads):
                part = share // num_threads + (number < share % num_threads)
                futures.append(pool.submit(work, name, number, part))
        for future in futures:
            future.result()
    tally.seconds = time.monotonic() - started
    return tally


def target_of(server: Served) -> Target:
    """All that listens of a served cluster."""
    listeners = server.listeners()
    http, grpc = listeners.pop("HTTP"), server.grpc
    return Target(http=http, grpc=grpc, sockets=listeners)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What must not change."""

    answer: Any
    """Of a good request."""
    workers: Any
    """Names, processes and states, and the generation."""
    rss_bytes: int
    """Memory of all processes."""
    num_fds: int
    """Open descriptors of all processes."""

    @classmethod
    def of(cls, server: Served) -> State:
        """Now, once nothing runs."""
        server.wait_idle()
        status = server.status()
        workers = [(w["name"], w["pid"], w["state"]) for w in status["workers"]]
        found = [psutil.Process(p.pid) for p in find_by_files(server.folder)]
        return cls(
            answer=[c["text"] for c in server.complete(**GOOD)["choices"]],
            workers=(status["state"], status["generation"], workers),
            rss_bytes=sum(p.memory_info().rss for p in found),
            num_fds=sum(p.num_fds() for p in found),
        )


def measure(num_inputs: int, seed: str = "expertmesh") -> tuple[Tally, list[State]]:
    """Fuzz a cluster of its own, and its state before, in the middle and after."""
    with (
        tempfile.TemporaryDirectory(prefix="fuzz", dir="/tmp") as folder,
        running_server(Path(folder), "--deterministic") as server,
    ):
        target = target_of(server)
        states = [State.of(server)]
        tally = Tally()
        for half in ("first", "second"):
            tally.add(fuzz(target, num_inputs // 2, f"{seed}/{half}"))
            states.append(State.of(server))
    return tally, states


def faults(tally: Tally, states: Sequence[State]) -> list[str]:
    """What is wrong, in words; empty where nothing is."""
    found = list(tally.examples)
    first, middle, last = states
    if first.answer != last.answer:
        found.append("a good request has another answer")
    if first.workers != last.workers:
        found.append(f"the cluster has changed: {first.workers} became {last.workers}")
    if last.rss_bytes > (1 + MAX_GROWTH) * middle.rss_bytes:
        found.append("memory has grown")
    if last.num_fds > middle.num_fds + 50:
        found.append("descriptors were leaked")
    return found


def report(tally: Tally, states: Sequence[State]) -> str:
    """The section's text."""
    head = ("surface", "inputs", *OUTCOMES)
    rows = [
        (name, f"{sum(c.values()):,}", *(f"{c[outcome]:,}" for outcome in OUTCOMES))
        for name, c in tally.counts.items()
    ]
    wrong = faults(tally, states)
    growth = [f"{s.rss_bytes / 2**20:.0f} MiB, {s.num_fds} descriptors" for s in states]
    lines = [
        "## Fuzzing",
        "",
        f"{tally.num_inputs:,} invalid inputs were sent in {tally.seconds:.0f} s, {NUM_THREADS} at "
        "a time, to one cluster (1 attention and 2 expert workers, the bundled model). *Closed*: "
        "the connection was closed. *Failed*: the response has status 5xx or a wrong format. "
        "*Hung*: no response within a minute.",
        "",
        table(head, rows),
        "",
        f"All processes before, in the middle and after the test: {'; '.join(growth)}.",
        "",
        "Nothing crashed, leaked or hung. The same workers serve, and a valid request has the same "
        "output."
        if not wrong
        else "**Wrong:**\n\n" + "\n".join(f"- {line}" for line in wrong),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.long.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=NUM_INPUTS)
    parser.add_argument("--seed", default="expertmesh")
    parser.add_argument(
        "--limits", action="store_true", help="bodies at the limits of size instead"
    )
    parser.add_argument("--quick", action="store_true", help="with --limits, fewer shapes")
    options = parser.parse_args(arguments)
    if options.limits:
        stops = fuzz_limits.measure(options.quick, sys.stderr.write)
        sys.stdout.write(fuzz_limits.report(stops) + "\n")
        return 1 if any(stop.stop_s > fuzz_limits.MAX_STOP_S for stop in stops) else 0
    tally, states = measure(options.inputs, options.seed)
    sys.stdout.write(report(tally, states) + "\n")
    return 1 if faults(tally, states) else 0


if __name__ == "__main__":
    sys.exit(main())
