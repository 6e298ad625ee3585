"""What an idle cluster costs, and how fast it wakes up: ``python -m benchmarks.serving.idle``.

1 attention + 2 expert workers on a private Ray, the bundled checkpoint, default settings. CPU time
is read from the system; the time to wake up is the product's own: from the worker's receipt of a
request while idle to its first dispatch of rows to the experts.
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
"""Of one core for each worker: the target."""
MAX_DISPATCH_MS = 10.0
"""Median from receipt to first dispatch: the target."""
SETTLE_S = 3.0
"""Until the start is over in every thread."""
PAUSE_S = 0.1
"""Between two requests, so that each finds the cluster idle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long and how often to look."""

    watch_s: float = 10.0
    """CPU time is taken over this time."""
    num_requests: int = 50
    """Sent one at a time."""


QUICK = Size(watch_s=1.0, num_requests=5)


def measure(size: Size) -> dict[str, Any]:
    """``cpu_percent`` of a core by worker, and ``dispatch_ms`` of all requests."""
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
    """One request of a short prompt, after a pause."""
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
    """The section of its page."""
    size = QUICK if quick else Size()
    result = measure(size)
    times = sorted(result["dispatch_ms"])
    median, ninth = statistics.median(times), times[int(len(times) * 0.9)]
    rows = [
        [f"CPU of {name}, % of a core", f"{percent:.1f}", f"below {MAX_CPU_PERCENT:g}"]
        for name, percent in result["cpu_percent"].items()
    ]
    rows += [
        ["receipt to first dispatch, median ms", f"{median:.1f}", f"at most {MAX_DISPATCH_MS:g}"],
        ["the same, 9 of 10 within ms", f"{ninth:.1f}", ""],
    ]
    return (
        "## Idle\n\n"
        "1 attention and 2 expert workers with the bundled model and default settings, idle for "
        f"{size.watch_s:g} s; then {size.num_requests} requests of 32 tokens, one at a time, each "
        f"{PAUSE_S * 1000:g} ms after the last.\n\n"
        f"{table(['', 'measured', 'target'], rows)}"
    )


def main() -> None:
    """Print the section."""
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")


if __name__ == "__main__":
    main()
