"""The Ray actor of one attention worker; ``attention_runtime`` is what it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.actor import WorkerActor

if TYPE_CHECKING:
    from workers.runtime import OnDeath, WorkerRuntime
    from workers.worker_args import WorkerArgs


class AttentionWorker(WorkerActor):
    """Serves requests: embeddings, attention, KV, router, sampling."""

    def _make_runtime(self, args: WorkerArgs, on_death: OnDeath) -> WorkerRuntime:
        from workers.attention_runtime import AttentionRuntime

        return AttentionRuntime(args, on_death)
