"""The colocated worker: an attention worker that also holds its share of the experts for all."""

from __future__ import annotations

from typing import Any

from workers.attention_runtime import AttentionRuntime
from workers.dist.colocated import ColocatedDispatcher, LoopbackTransport
from workers.dist.dispatcher import TokenDispatcher


class ColocatedRuntime(AttentionRuntime):
    """Serves requests, and in the same steps its expert slots to all ranks."""

    def _load(self) -> dict[str, Any]:
        facts = super()._load()
        assert self._experts is not None
        return {**facts, **self._experts.facts()}

    def _open_dispatcher(self) -> TokenDispatcher:
        """Both sides of the exchange, over one transport."""
        transport = LoopbackTransport(self.transport, self.member.rank)
        server = self._load_experts(transport).server
        return ColocatedDispatcher(self._remote_dispatcher(transport), server)

    def _stats(self) -> dict[str, float]:
        experts = self._experts
        return {**(experts.stats() if experts is not None else {}), **super()._stats()}
