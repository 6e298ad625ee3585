"""Workers are killed beside many busy processes: no other worker may be taken for dead."""

from __future__ import annotations

import random

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import RayCluster, connected_ray, serving
from tests.harness.fault_rows import (
    SMALL,
    check_answers,
    entries_since,
    kill,
    serving_name,
    undisturbed,
    whole,
)
from tests.long.false_alarms import busy

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_BUSY = 30
NUM_KILLS = 20


def test_kills_beside_busy_processes_cost_no_other_worker() -> None:
    draw = random.Random(1)
    config = row_config(2, 3, num_redundant=22)
    expected = undisturbed(SMALL)
    with connected_ray(), serving(RayCluster(config)) as cluster, busy(NUM_BUSY):
        for _ in range(NUM_KILLS):
            before = whole(cluster)
            victim = serving_name(cluster, "expert", draw.randrange(3))
            with gateway_of(cluster) as gateway:
                streams = gateway.stream(make_calls(SMALL.num_streams, SMALL.num_tokens))
                streams.wait_tokens(draw.randrange(100, 300))
                kill(cluster, victim)
                check_answers(streams.finish(), expected)
            causes = [e["cause"] for e in entries_since(before, whole(cluster))]
            lost = [c.partition(":")[0] for c in causes if c.startswith("lost")]
            assert lost == [f"lost {victim}"], causes
