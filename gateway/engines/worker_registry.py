"""The open streams of a gateway by worker, and which of these workers take which requests. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.cluster.view import AttentionEndpoint
from gateway.engines.engine_client import EngineClient
from gateway.engines.submission import Submission


class WorkerRegistry:
    """Clients by worker name; decides which workers may run a request."""

    def __init__(self) -> None:
        self.clients: dict[str, EngineClient] = {}
        """All clients, those without a hello and those of drained workers included."""
        self.leaving: frozenset[str] = frozenset()
        """Workers that are drained: they get no requests any more."""
        self.lacking: dict[str, frozenset[str]] = {}
        """By worker, the adapters that it could not load."""

    def set_endpoints(self, endpoints: Sequence[AttentionEndpoint]) -> None:
        """Apply the states of a snapshot's workers."""
        self.leaving = frozenset(e.name for e in endpoints if e.is_leaving)
        self.lacking = {e.name: e.lacks for e in endpoints if e.lacks}

    @property
    def ready(self) -> list[EngineClient]:
        """Open streams to workers that take requests, by worker name."""
        clients = self.clients.values()
        ready = (c for c in clients if c.hello is not None and c.worker not in self.leaving)
        return sorted(ready, key=lambda client: client.worker)

    @property
    def submissions(self) -> list[Submission]:
        """All requests that a worker has."""
        return [entry for client in self.clients.values() for entry in client.submissions]

    def can_run(self, entry: Submission, client: EngineClient) -> bool:
        """Whether a worker can run a request: it lacks no adapter of the request."""
        return entry.request.adapter not in self.lacking.get(client.worker, ())

    def can_any_run(self, entry: Submission) -> bool:
        """Whether a worker that takes requests can run this one."""
        return any(self.can_run(entry, client) for client in self.ready)

    def has_adapter(self, key: str) -> bool:
        """Whether a worker can run requests with an adapter, or it is not known which ones serve;
        an empty key is that of the model itself.
        """
        ready = self.ready
        return not ready or any(key not in self.lacking.get(c.worker, ()) for c in ready)

    def num_places(self, max_num_seqs: int) -> int:
        """Requests that all workers run at once: ``max_num_seqs`` each, or where KV blocks run
        short as many as decode now.
        """
        return sum(client.num_places(max_num_seqs) for client in self.ready)
