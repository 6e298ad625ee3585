"""The colocated worker: an attention worker that also holds its share of the experts for all."""

from __future__ import annotations

from typing import Any

from workers.attention_runtime import AttentionRuntime
from workers.dist.colocated import ColocatedDispatcher, LoopbackTransport
from workers.dist.dispatcher import TokenDispatcher
from workers.dist.expert_server import ExpertServer


class ColocatedRuntime(AttentionRuntime):
    """Serves requests, and in the same steps its expert slots to all ranks."""

    _server: ExpertServer | None = None

    def _load(self) -> dict[str, Any]:
        return {**super()._load(), "num_slots": self.args.num_slots}

    def _open_dispatcher(self) -> TokenDispatcher:
        """Both sides of the exchange, over one transport."""
        transport = LoopbackTransport(self.transport, self.member.rank)
        self._server = self._load_experts(transport)
        return ColocatedDispatcher(self._remote_dispatcher(transport), self._server)

    def _stats(self) -> dict[str, float]:
        server = self._server
        return {
            "expert_worker_tokens_total": float(server.num_tokens if server is not None else 0),
            "expert_worker_slots": float(self.args.num_slots),
            **super()._stats(),
        }
