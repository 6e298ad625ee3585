"""A second gateway replica with clients of its own, in a process that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness.serving_cluster import ServingCluster


@contextmanager
def other_gateway(cluster: ServingCluster) -> Iterator[subprocess.Popen[str]]:
    """The process; at the start of the block each of its eight streams has begun."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.faults.second_gateway"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        given = {"config": cluster.config.to_dict(), "snapshot": cluster.snapshot()}
        child.stdin.write(json.dumps(given) + "\n")
        child.stdin.flush()
        assert child.stdout.readline() == "flowing\n"
        yield child
    finally:
        child.kill()
        child.communicate()
