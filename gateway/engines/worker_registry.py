"""The clients of a gateway by worker, and the requests that each worker can run. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.cluster.view import AttentionEndpoint
from gateway.engines.engine_client import EngineClient
from gateway.engines.submission import Submission


class WorkerRegistry:
    """Clients by worker name; decides which workers may run a request."""

    def __init__(self) -> None:
        self.clients: dict[str, EngineClient] = {}
        """All clients, including clients without a hello and clients of drained workers."""
        self.leaving: frozenset[str] = frozenset()
        """Workers that are drained and get no further requests."""
        self.lacking: dict[str, frozenset[str]] = {}
        """Adapters that could not be loaded, by worker."""

    def set_endpoints(self, endpoints: Sequence[AttentionEndpoint]) -> None:
        """Apply the worker states of a snapshot."""
        self.leaving = frozenset(e.name for e in endpoints if e.is_leaving)
        self.lacking = {e.name: e.lacks for e in endpoints if e.lacks}

    @property
    def ready(self) -> list[EngineClient]:
        """Connected clients of workers that take requests, sorted by worker name."""
        clients = self.clients.values()
        ready = (c for c in clients if c.hello is not None and c.worker not in self.leaving)
        return sorted(ready, key=lambda client: client.worker)

    @property
    def submissions(self) -> list[Submission]:
        """All requests at workers."""
        return [entry for client in self.clients.values() for entry in client.submissions]

    def can_run(self, entry: Submission, client: EngineClient) -> bool:
        """Whether a worker has the adapter of a request."""
        return entry.request.adapter not in self.lacking.get(client.worker, ())

    def can_any_run(self, entry: Submission) -> bool:
        """Whether any worker that takes requests can run this request."""
        return any(self.can_run(entry, client) for client in self.ready)

    def has_adapter(self, key: str) -> bool:
        """Whether a worker can run requests with an adapter (empty key: the base model). True if no
        worker is connected.
        """
        ready = self.ready
        return not ready or any(key not in self.lacking.get(c.worker, ()) for c in ready)

    def num_seats(self, max_num_seqs: int) -> int:
        """Number of sequences that all workers can run: ``max_num_seqs`` each, or the number of
        decoding sequences of a worker that runs short of KV blocks.
        """
        return sum(client.num_seats(max_num_seqs) for client in self.ready)
