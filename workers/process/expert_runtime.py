"""The expert worker: it holds expert slots and no state of requests."""

from __future__ import annotations

import time
from typing import Any

from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.process.runtime import IDLE_WAIT_S, WorkerRuntime


class ExpertRuntime(WorkerRuntime):
    """Loads the experts that the placement gives its device, and serves steps with them."""

    _busy_s = 0.0
    _num_steps = 0

    def _load(self) -> dict[str, Any]:
        experts = self._load_experts(self.transport)
        return {"dtype": str(self.dtype).removeprefix("torch."), **experts.facts()}

    def _between_steps(self) -> None:
        """Expert workers have no requests."""

    def _enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        assert self._experts is not None
        self._experts.server.set_placement(placement, generation)

    def _run_step(self) -> None:
        assert self._experts is not None
        self.activity.is_idle = True
        header = self.channel.wait(IDLE_WAIT_S)
        self.activity.is_idle = False
        if header is None:
            return
        self.activity.rows = header.decode_rows + header.prefill_rows
        self.membership.follow_epoch(header)
        started = time.monotonic()
        self._experts.server.run_step(header)
        self._experts.server.timer.end_step()
        self.membership.committed(is_shared=True)
        self.activity.advance()
        ended = self.membership.last_commit
        self._busy_s += ended - started
        self._num_steps += 1

    def _stats(self) -> dict[str, float]:
        return {
            **super()._stats(),
            "expert_worker_busy_seconds_total": self._busy_s,
            "steps_total": float(self._num_steps),
        }
