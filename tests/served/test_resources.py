"""What a server takes of its host: CPU shares in Ray's books, threads, and Ray's own memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import psutil
import pytest

from benchmarks.harness.server import WAIT_S, Served
from cluster.core.process import count_cpus
from cluster.launch.orphans import find_by_files

pytestmark = pytest.mark.ray

READ_RESOURCES = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(json.dumps([ray.cluster_resources(), ray.available_resources()]))
"""


def resources(server: Served) -> tuple[dict[str, float], dict[str, float]]:
    """What the server's Ray has in total, and what is free."""
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(server.folder / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # stay on the loopback interface
    }
    done = subprocess.run(
        [sys.executable, "-c", READ_RESOURCES, server.record.address],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    answer: Any = json.loads(done.stdout)
    return answer[0], answer[1]


def test_workers_share_the_cpus_and_no_other_process_takes_any(server: Served) -> None:
    total, free = resources(server)
    cpus = count_cpus()
    share = math.floor(cpus / 3 * 10_000) / 10_000
    assert total["CPU"] == cpus
    assert total["CPU"] - free.get("CPU", 0.0) == pytest.approx(3 * share, abs=1e-6)
    workers = server.status()["workers"]
    assert [w["threads"] for w in workers] == [max(1, math.floor(share))] * 3
    assert [w["device"] for w in workers] == ["cpu"] * 3


def test_the_raylet_has_one_arena_without_caches(server: Served) -> None:
    found = [psutil.Process(p.pid) for p in find_by_files(server.folder)]
    (raylet,) = [p for p in found if p.name() == "raylet"]
    environment = raylet.environ()
    assert environment["LD_PRELOAD"].endswith("libjemalloc.so")
    assert environment["MALLOC_CONF"] == "narenas:1,tcache:false"
