"""What a worker's actor does for a controller that calls by Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.core.errors import SupersededError
from tests.paths import ROOT
from workers.process.control.lease import TermGuard
from workers.process.worker.actor import WorkerActor
from workers.transport.nccl_environment import NCCL_ENVIRONMENT


class StoppableWorker:
    """Knows its newest controller, and when it was stopped."""

    def __init__(self) -> None:
        self.control = SimpleNamespace(check_term=TermGuard().check)
        self.num_stops = 0

    def stop(self) -> None:
        self.num_stops += 1


class Actor(WorkerActor):
    """An actor outside of Ray."""

    def __init__(self, worker: StoppableWorker) -> None:
        self._worker = worker  # type: ignore[assignment]


def test_a_worker_stops_for_its_newest_controller_only() -> None:
    worker = StoppableWorker()
    actor = Actor(worker)
    worker.control.check_term(2, "newer")
    with pytest.raises(SupersededError):
        actor.stop(1, "older")
    assert worker.num_stops == 0
    actor.stop(2, "newer")
    assert worker.num_stops == 1


SHOW_ENVIRONMENT_AT_THE_IMPORT_OF_TORCH = """
import json, os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps(dict(os.environ)), flush=True)
            os._exit(0)

from workers.process.worker.actor import AttentionWorker
sys.meta_path.insert(0, Finder())
AttentionWorker({"workers": json.loads(sys.argv[1])}, {}, "", {})
"""


@pytest.mark.parametrize("workers", [{}, {"other_pools": [["expert", 1]]}])
def test_errors_of_nccl_do_not_end_a_worker(workers: dict[str, Any]) -> None:
    """The variables are set before torch is imported, whatever the node's environment says."""
    shown = subprocess.run(
        [sys.executable, "-c", SHOW_ENVIRONMENT_AT_THE_IMPORT_OF_TORCH, json.dumps(workers)],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"},
    )
    environment = json.loads(shown.stdout)
    assert {name: environment.get(name) for name in NCCL_ENVIRONMENT} == NCCL_ENVIRONMENT
    for name in ("ASYNC_ERROR_HANDLING", "ENABLE_MONITORING", "DUMP_ON_TIMEOUT"):
        assert environment[f"TORCH_NCCL_{name}"] == "0"
