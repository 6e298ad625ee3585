"""The colocated worker: an attention worker that also holds a share of the experts."""

from __future__ import annotations

from typing import Any

from workers.dispatch.colocated import ColocatedDispatcher, LoopbackTransport
from workers.dispatch.dispatcher import TokenDispatcher
from workers.process.attention_runtime import AttentionRuntime


class ColocatedRuntime(AttentionRuntime):
    """Serves requests, and in the same steps computes its expert slots for all ranks."""

    def _load(self) -> dict[str, Any]:
        facts = super()._load()
        assert self._experts is not None
        return {**facts, **self._experts.facts()}

    def _open_dispatcher(self) -> TokenDispatcher:
        """Attention side and expert side over one transport."""
        transport = LoopbackTransport(self.transport, self.member.rank)
        server = self._load_experts(transport).server
        return ColocatedDispatcher(transport, self._remote_dispatcher(transport), server)
