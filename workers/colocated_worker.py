"""The Ray actor of one colocated worker; ``colocated_runtime`` is what it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.actor import WorkerActor

if TYPE_CHECKING:
    from workers.runtime import OnDeath, WorkerRuntime
    from workers.worker_args import WorkerArgs


class ColocatedWorker(WorkerActor):
    """Serves requests, and holds experts for all."""

    def _make_runtime(self, args: WorkerArgs, on_death: OnDeath) -> WorkerRuntime:
        from workers.colocated_runtime import ColocatedRuntime

        return ColocatedRuntime(args, on_death)
