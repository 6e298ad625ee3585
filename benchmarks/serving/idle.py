"""CPU time of an idle cluster, and its wake-up time: ``python -m benchmarks.serving.idle``.

1 attention and 2 expert workers run the bundled model with default settings on a private Ray. The
wake-up time is measured by the worker: from the receipt of a request while idle to the first
dispatch of rows to the experts.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.harness.engine_stream import EngineStream
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    connected_ray,
    make_config,
    serving,
)
from benchmarks.report.results import table
from cluster.config.transport import TransportSection
from cluster.launch.model_source import bundled_checkpoint
from workers.requests.request import Request, SamplingParams

MAX_CPU_PERCENT = 3.0
"""Target: most CPU time of a worker, in percent of a core."""
MAX_DISPATCH_MS = 10.0
"""Target: longest median time from receipt to first dispatch."""
SETTLE_S = 3.0
"""Time until all threads have started."""
PAUSE_S = 0.1
"""Pause between two requests, so that each arrives at an idle cluster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Sizes of the measurement."""

    watch_s: float = 10.0
    """Time over which CPU time is measured."""
    num_requests: int = 50
    """Requests that are sent one at a time."""


QUICK = Size(watch_s=1.0, num_requests=5)


def measure(size: Size) -> dict[str, Any]:
    """Return ``cpu_percent`` of each worker and ``dispatch_ms`` of all requests."""
    plain = TransportSection()
    config = make_config(
        bundled_checkpoint(),
        engine={"kv_cache_bytes": None},
        transport={"detection_limit_s": plain.detection_limit_s},
    )
    with connected_ray(), serving(RayCluster(config)) as cluster:
        time.sleep(SETTLE_S)
        cpu_percent = _cpu_percent(cluster, size.watch_s)
        stream = cluster.stream()
        dispatch_ms = [_dispatch_ms(stream, i) for i in range(size.num_requests)]
        stream.close()
    return {"cpu_percent": cpu_percent, "dispatch_ms": dispatch_ms}


def _cpu_percent(cluster: ServingCluster, watch_s: float) -> dict[str, float]:
    processes = {w["name"]: psutil.Process(w["pid"]) for w in cluster.snapshot()["workers"]}
    before = {name: _cpu_s(process) for name, process in processes.items()}
    started = time.monotonic()
    time.sleep(watch_s)
    passed = time.monotonic() - started
    return {name: (_cpu_s(p) - before[name]) / passed * 100 for name, p in processes.items()}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _dispatch_ms(stream: EngineStream, number: int) -> float:
    """Send a short request after a pause; returns the time to its first dispatch."""
    time.sleep(PAUSE_S)
    request = Request(
        request_id=f"idle-{number}",
        prompt=tuple(range(10, 42)),
        params=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
    )
    timings = stream.finish([request])[request.request_id].outputs[-1].timings
    assert timings is not None, "the last output tells the times"
    return timings.first_dispatch_s * 1000


def section(quick: bool) -> str:
    """Return the Markdown section."""
    size = QUICK if quick else Size()
    result = measure(size)
    times = sorted(result["dispatch_ms"])
    median, ninth = statistics.median(times), times[int(len(times) * 0.9)]
    rows = [
        [f"CPU of {name}, % of a core", f"{percent:.1f}", f"below {MAX_CPU_PERCENT:g}"]
        for name, percent in result["cpu_percent"].items()
    ]
    rows += [
        [
            "time from receipt to first dispatch, median, ms",
            f"{median:.1f}",
            f"at most {MAX_DISPATCH_MS:g}",
        ],
        ["time from receipt to first dispatch, p90, ms", f"{ninth:.1f}", ""],
    ]
    return (
        "## Idle\n\n"
        "1 attention and 2 expert workers with the bundled model and default settings are idle for "
        f"{size.watch_s:g} s. Then {size.num_requests} requests of 32 tokens are sent one at a "
        f"time, with a pause of {PAUSE_S * 1000:g} ms before each.\n\n"
        f"{table(['quantity', 'measured', 'target'], rows)}"
    )


def main() -> None:
    """Print the section."""
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")


if __name__ == "__main__":
    main()
