"""Whether a worker that is only busy is declared lost: full load, and no fault at all.

python -m tests.long.false_alarms [--minutes 10] [--num-clients 24] [--num-busy 10]

One attention and two expert workers with the bundled model on a private Ray of two CPUs, default
settings; clients that ask again as soon as they have their answer. Busy processes of the same
priority begin when the cluster has served alone for a while. Ends with status 1, and names the lost
worker, when the generation, the controller's term or a worker's state changes, or a call fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks.faults.load import FaultLoad
from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    connected_ray,
    make_config,
    serving,
)
from cluster.launch.model_source import bundled_checkpoint
from cluster.policy.silence import WINDOW_S

_POLL_S = 1.0
_NUM_TOKENS = 200
_ALONE_S = 3 * WINDOW_S
"""Time after which the controller knows nothing but a quiet machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quiet:
    """What a run without a fault showed."""

    minutes: float
    """How long the load ran."""
    num_deltas: int
    """Deltas that the clients got."""
    longest_pause_s: float
    """Longest time between two of them on one stream."""
    num_busy: int
    """Busy processes beside the cluster."""
    patience_s: float
    """Longest silence that the workers' gaps explained, before the cap of the detection limit."""
    alarms: tuple[str, ...]
    """Lost workers and failed calls; empty when all is well."""


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def watch(cluster: ServingCluster, num_clients: int, num_busy: int, minutes: float) -> Quiet:
    """Load a cluster that serves, and look for alarms until the first, or the time is over."""
    before = cluster.snapshot()
    began = time.monotonic()
    with gateway_of(cluster) as gateway:
        load = FaultLoad(gateway, make_calls(num_clients, _NUM_TOKENS))
        with load.running(), contextlib.ExitStack() as others:
            alarms: list[str] = []
            patience_s, is_alone = 0.0, True
            while not alarms and time.monotonic() - began < 60 * minutes:
                time.sleep(_POLL_S)
                if is_alone and time.monotonic() - began >= _ALONE_S:
                    others.enter_context(busy(num_busy))
                    is_alone = False
                snapshot = cluster.snapshot()
                known = (w["patience_s"] or 0.0 for w in snapshot["workers"])
                patience_s = max(patience_s, *known)
                lost = [w for w in snapshot["workers"] if w["state"] != "SERVING"]
                alarms += [f"{w['name']} is {w['state']}: {w['reason']}" for w in lost]
                for key in ("term", "generation"):
                    if snapshot[key] != before[key]:
                        alarms.append(f"{key} is {snapshot[key]}, not {before[key]}")
        return Quiet(
            minutes=round((time.monotonic() - began) / 60, 2),
            num_deltas=sum(line.num_deltas for line in load.lines),
            longest_pause_s=round(load.longest_pause(began), 3),
            num_busy=num_busy,
            patience_s=round(patience_s, 3),
            alarms=(*alarms, *load.failures),
        )


def main() -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--num-clients", type=int, default=24)
    parser.add_argument("--num-busy", type=int, default=0)
    parser.add_argument("--detection-limit-s", type=float, default=2.0)
    args = parser.parse_args()
    config = make_config(
        bundled_checkpoint(), 1, 2, transport={"detection_limit_s": args.detection_limit_s}
    )
    with connected_ray(), serving(RayCluster(config)) as cluster:
        quiet = watch(cluster, args.num_clients, args.num_busy, args.minutes)
    print(json.dumps(asdict(quiet)))
    return 1 if quiet.alarms else 0


if __name__ == "__main__":
    sys.exit(main())
