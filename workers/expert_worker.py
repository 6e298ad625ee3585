"""The Ray actor of one expert worker; ``expert_runtime`` is what it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.actor import WorkerActor

if TYPE_CHECKING:
    from workers.runtime import OnDeath, WorkerRuntime
    from workers.worker_args import WorkerArgs


class ExpertWorker(WorkerActor):
    """Computes its expert slots for the rows that come in."""

    def _make_runtime(self, args: WorkerArgs, on_death: OnDeath) -> WorkerRuntime:
        from workers.expert_runtime import ExpertRuntime

        return ExpertRuntime(args, on_death)
