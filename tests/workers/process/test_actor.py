"""What a worker's actor does for a controller that calls by Ray."""

from __future__ import annotations

import pytest

from cluster.core.errors import SupersededError
from workers.process.actor import WorkerActor
from workers.process.control.lease import TermGuard
from workers.process.runtime import OnDeath, WorkerRuntime
from workers.process.worker_args import WorkerArgs


class Runtime:
    """Knows its newest controller, and when it was stopped."""

    def __init__(self) -> None:
        self.follow = TermGuard().check
        self.num_stops = 0

    def stop(self) -> None:
        self.num_stops += 1


class Worker(WorkerActor):
    """An actor outside of Ray."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime  # type: ignore[assignment]

    def _make_runtime(self, args: WorkerArgs, on_death: OnDeath) -> WorkerRuntime:
        raise NotImplementedError


def test_a_worker_stops_for_its_newest_controller_only() -> None:
    runtime = Runtime()
    worker = Worker(runtime)
    runtime.follow(2, "newer")
    with pytest.raises(SupersededError):
        worker.stop(1, "older")
    assert runtime.num_stops == 0
    worker.stop(2, "newer")
    assert runtime.num_stops == 1
