"""Scaling up and down again and again under load: the system says that nothing is left behind.

Exact are descriptors, threads and listening sockets of every worker that stays, the processes
themselves, Ray's living actors, placement groups and files of shared memory, each time all requests
have ended; processes in which Ray works all the time may add a few of its pools (``census``).

Memory has a rule, since allocators keep some of it: from the tenth cycle to the last one, each
process may grow by ``GROWTH_PER_CYCLE`` MiB a cycle, by a fitted line. What one cycle could leak, a
worker's connection with its buffers or its weights, is larger; what the controller remembers of
lost workers and of past changes is less, and has a limit. Ray's own processes have a wider rule:
its agent remembers processes that have ended.
"""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from benchmarks.faults.load import FaultLoad
from benchmarks.harness.cluster_gateway import ClusterGateway, gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import RayCluster, ServingCluster, connected_ray, serving
from cluster.launch.local_ray import OBJECT_STORE_BYTES, common_environment
from tests.harness.census import RAYS_OWN, Census, own_memory, settled
from tests.harness.fault_rows import blocks_held, quiet_config
from tests.system.faults.test_scaling import scale

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.ray

ENGINE = {"kv_cache_bytes": 8 << 20}
"""A KV cache all of which is in use soon: the system counts a block when it is first written."""
MEMORY_FROM = 10
"""Cycles before memory is compared."""
GROWTH_PER_CYCLE = 0.1
"""MiB that a process of ours may grow by in a cycle."""
RAYS_GROWTH_PER_CYCLE = 0.3
"""The same of Ray's own."""
NUM_STREAMS = 4

Memory = Mapping[tuple[int, str], float]


def cycle(cluster: ServingCluster, gateway: ClusterGateway) -> None:
    """1 + 2 workers, 2 + 3, 1 + 2; under a light load, of which all calls succeed."""
    load = FaultLoad(gateway, make_calls(NUM_STREAMS, 64))
    with load.running():
        load.wait_deltas(2)
        for counts in ({"attention": 2, "expert": 3}, {"attention": 1, "expert": 2}):
            done = scale(cluster, **counts)
            assert done["state"] == "SUCCEEDED", done
        load.wait_deltas(2)
    assert load.failures == []
    cluster.wait(lambda snapshot: blocks_held(snapshot) == 0, fresh=True)


def growth(seen: Sequence[Memory]) -> dict[str, float]:
    """By process that was always there, MiB a cycle by a fitted line."""
    series: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    for memory in seen:
        for process, mib in memory.items():
            series[process].append(mib)
    return {
        f"{name} ({pid})": statistics.linear_regression(range(len(mibs)), mibs).slope
        for (pid, name), mibs in series.items()
        if len(mibs) == len(seen)
    }


def limit_of(process: str) -> float:
    """MiB that a process may grow by in a cycle."""
    return RAYS_GROWTH_PER_CYCLE if process.split()[0] in RAYS_OWN else GROWTH_PER_CYCLE


def go_through(num_cycles: int, warm_up: int, **ray: Any) -> tuple[list[str], list[Memory]]:
    """What is left after the cycles that was not there before, and memory after each.

    ``warm_up`` cycles come first: what is made once, as threads of a pool, is there then.
    """
    with (
        connected_ray(**ray),
        serving(RayCluster(quiet_config(1, 2, engine=ENGINE))) as cluster,
        gateway_of(cluster) as gateway,
    ):
        before: Census | None = None
        seen: list[Memory] = []
        for number in range(warm_up + num_cycles):
            cycle(cluster, gateway)
            if number + 1 == warm_up:
                before = settled()
            seen.append(own_memory())
            logger.info("cycle %d of %d", number + 1, warm_up + num_cycles)
        assert before is not None
        for line in before.differences(settled(like=before)):
            logger.warning("left: %s", line)
        return before.differences(settled(like=before)), seen


@pytest.mark.slow
def test_a_few_cycles_leave_nothing_behind() -> None:
    left, _ = go_through(2, warm_up=1)
    assert left == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_cycles_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in common_environment().items():  # allocators, as the launcher sets them
        monkeypatch.setenv(name, value)
    left, seen = go_through(50, warm_up=5, object_store_memory=OBJECT_STORE_BYTES)
    grown = growth(seen[MEMORY_FROM:])
    for name, mib in sorted(grown.items()):
        logger.info("%s: %+.3f MiB a cycle", name, mib)
    assert left == []
    assert {name: mib for name, mib in grown.items() if mib > limit_of(name)} == {}


def test_growth_is_the_slope_of_those_that_stay() -> None:
    seen = [{(1, "a"): 10.0 + i / 2, (2, "b"): 5.0} for i in range(4)]
    seen[2][3, "c"] = 1.0
    assert growth(seen) == {"a (1)": pytest.approx(0.5), "b (2)": pytest.approx(0.0)}
