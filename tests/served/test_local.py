"""``serve --mode local`` as users start it: one worker with all cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.server import running_server
from cluster.core.process import count_cpus
from cluster.launch.fleet import describe_threads

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_one_worker_computes_with_all_cores_and_the_start_says_it(tmp_path: Path) -> None:
    with running_server(tmp_path, "--mode", "local") as server:
        (worker,) = server.status()["workers"]
        assert worker["threads"] == count_cpus()
        assert describe_threads([worker]) in (tmp_path / "stderr").read_text().splitlines()
