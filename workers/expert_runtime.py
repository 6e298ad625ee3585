"""The expert worker: expert slots and nothing else. No request has any state here."""

from __future__ import annotations

import time
from typing import Any

from cluster.placement import ExpertPlacement
from cluster.topology import Generation
from workers.runtime import IDLE_WAIT_S, WorkerRuntime


class ExpertRuntime(WorkerRuntime):
    """Loads the experts that the placement gives its device, and serves steps with them."""

    _busy_s = 0.0
    _num_steps = 0

    def _load(self) -> dict[str, Any]:
        experts = self._load_experts(self.transport)
        return {"dtype": str(self.dtype).removeprefix("torch."), **experts.facts()}

    def _close_gates(self) -> None:
        """Nothing: no client comes here."""

    def _open_gates(self) -> None:
        """Nothing: no client comes here."""

    def _between_steps(self) -> None:
        """Nothing: no request has any state here."""

    def _enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        assert self._experts is not None
        self._experts.server.set_placement(placement, generation)

    def _turn(self) -> None:
        assert self._experts is not None
        self._idle = True
        header = self.channel.wait(IDLE_WAIT_S)
        self._idle = False
        if header is None:
            return
        self.membership.follow_epoch(header)
        started = time.monotonic()
        self._experts.server.run_step(header)
        if self._traced is not None:
            self._traced.end_step()
        self.membership.last_commit = ended = time.monotonic()
        self._busy_s += ended - started
        self._num_steps += 1

    def _stats(self) -> dict[str, float]:
        return {
            **(self._experts.stats() if self._experts is not None else {}),
            "expert_worker_busy_seconds_total": self._busy_s,
            "steps_total": float(self._num_steps),
        }
