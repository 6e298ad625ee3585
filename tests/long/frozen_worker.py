"""How soon a frozen worker is noticed: SIGSTOP until the controller declares it lost.

python -m tests.long.frozen_worker [--repetitions 20] [--num-clients 24] [--role expert]

One attention and three expert workers with the bundled model on a private Ray, default settings.
Each repetition waits until the cluster is whole, and until the controller has forgotten how the
start of the worker before kept the machine busy: up to a minute. ``--num-clients 0`` leaves the
cluster idle. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from benchmarks.faults.load import FaultLoad, wait
from benchmarks.faults.site import Site
from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import RayCluster, connected_ray, make_config, serving
from cluster.launch.model_source import bundled_checkpoint
from cluster.policy.silence import WINDOW_S
from tests.long.reliability_rows import DETECTION_LIMIT_S

_NUM_EXPERTS = 3
_NUM_TOKENS = 200
_RESTORE_LIMIT_S = 60.0
_POLL_S = 0.02


@dataclass(kw_only=True, slots=True)
class Noticed:
    """What the faults showed."""

    num_clients: int
    role: str
    noticed_s: list[float] = field(default_factory=list)
    """By repetition, seconds from the signal to the loss."""
    patience_s: list[float] = field(default_factory=list)
    """By repetition, the silence that the gaps of late explained on that host."""
    failures: list[str] = field(default_factory=list)
    """Calls that failed, and other workers that were lost."""

    def to_json(self) -> str:
        """With the median and the worst."""
        found = {"median_s": statistics.median(self.noticed_s), "worst_s": max(self.noticed_s)}
        return json.dumps(found | asdict(self))


def _is_settled(site: Site) -> bool:
    """All workers serve, and the controller knows how regular they are."""
    serve = [w for w in site.snapshot()["workers"] if w["state"] == "SERVING"]
    return len(serve) == 1 + _NUM_EXPERTS and all(w["patience_s"] for w in serve)


def freeze(site: Site, draw: random.Random, found: Noticed) -> None:
    """One fault, and its end."""
    wait(lambda: _is_settled(site), "a whole cluster", _RESTORE_LIMIT_S)
    time.sleep(WINDOW_S + draw.uniform(0.0, 1.0))
    before = {w["name"]: w for w in site.snapshot()["workers"]}
    name = site.names(found.role)[0]
    began = time.monotonic()
    site.signal([name], signal.SIGSTOP)
    while not (lost := _lost(site, before)):
        time.sleep(_POLL_S)
    found.noticed_s.append(round(time.monotonic() - began, 3))
    found.patience_s.append(round(before[name]["patience_s"], 3))
    found.failures += [f"{n}: {why}" for n, why in lost.items() if n != name]
    site.wake()


def _lost(site: Site, before: dict[str, dict[str, object]]) -> dict[str, str]:
    """Workers that have been lost since."""
    return {
        w["name"]: w["reason"]
        for w in site.snapshot()["workers"]
        if w["state"] == "LOST" and before.get(w["name"], {}).get("state") == "SERVING"
    }


@contextlib.contextmanager
def _loaded(cluster: RayCluster, found: Noticed) -> Iterator[None]:
    if not found.num_clients:
        yield
        return
    with gateway_of(cluster) as gateway:
        load = FaultLoad(gateway, make_calls(found.num_clients, _NUM_TOKENS))
        with load.running():
            load.wait_deltas(3)
            yield
        found.failures += load.failures


def main() -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m tests.long.frozen_worker")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--num-clients", type=int, default=24)
    parser.add_argument("--role", choices=["attention", "expert"], default="expert")
    args = parser.parse_args()
    config = make_config(
        bundled_checkpoint(),
        1,
        _NUM_EXPERTS,
        workers={"num_redundant_experts": 22},
        engine={"kv_cache_bytes": 64 << 20},
        transport={"detection_limit_s": DETECTION_LIMIT_S},
    )
    found = Noticed(num_clients=args.num_clients, role=args.role)
    draw = random.Random(1)
    with connected_ray(), serving(RayCluster(config)) as cluster:
        assert isinstance(cluster, RayCluster)
        with contextlib.closing(Site(cluster, draw)) as site, _loaded(cluster, found):
            for _ in range(args.repetitions):
                freeze(site, draw, found)
    print(found.to_json())
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
