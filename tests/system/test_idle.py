"""An idle cluster does next to nothing: counted in wake-ups and steps, not in seconds.

What it costs in seconds is measured by ``benchmarks.serving.idle``.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from tests.fakes import Wakeups
from tests.harness.tiers import quick_rows
from workers.process.data_plane import IDLE_WAIT_S
from workers.requests.request import Request, SamplingParams

WATCHED_S = 2.5
NUM_REQUESTS = 3
PAIRS = 4 * 2 * 2
"""Of a request: rows (3 of the prompt, 1 of a token), layers, experts of a row."""


def expert_work(cluster: ThreadCluster) -> list[float]:
    """Rows times experts that each worker with experts has computed, for whomever."""
    workers = cluster.snapshot(fresh=True)["workers"]
    return [w["stats"]["expert_worker_tokens_total"] for w in workers if w["slots"] is not None]


@pytest.mark.parametrize("mode", quick_rows({"disaggregated"}, ["disaggregated", "colocated"]))
def test_an_idle_cluster_sleeps(tiny_checkpoint: Path, mode: str) -> None:
    cluster = ThreadCluster(make_config(tiny_checkpoint, 2, 2, workers={"mode": mode}))
    with serving(cluster):
        stream = cluster.stream()
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        for i in range(NUM_REQUESTS):
            stream.finish([Request(request_id=f"r{i}", prompt=(5, 6, 7), params=params)])
        cluster.wait(lambda _: sum(expert_work(cluster)) == NUM_REQUESTS * PAIRS)
        workers, started = cluster.group.workers, time.monotonic()
        wakeups = {n: Wakeups(worker.membership._connections) for n, worker in workers.items()}
        threading.Event().wait(WATCHED_S)
        woken = {name: found.count for name, found in wakeups.items()}
        watched_s = time.monotonic() - started
        limit = watched_s / IDLE_WAIT_S + 4  # once a turn; the last steps' frames, and the ends
        assert all(count <= limit for count in woken.values()), woken
        assert sum(expert_work(cluster)) == NUM_REQUESTS * PAIRS
        stream.close()
