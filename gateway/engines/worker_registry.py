"""Registry of the gateway's engine clients, and of the requests that each worker can run. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gateway.cluster.view import AttentionEndpoint
from gateway.engines.engine_client import EngineClient
from gateway.engines.submission import Submission


class WorkerRegistry:
    """Engine clients by worker name. Decides which workers may run a request."""

    def __init__(self) -> None:
        self.clients: dict[str, EngineClient] = {}
        """All clients by worker name, including clients of drained or unconnected workers."""
        self.leaving: frozenset[str] = frozenset()
        """Names of workers that are being drained and get no further requests."""
        self.groups: dict[str, str] = {}
        """Step group of each worker."""
        self.lacking: dict[str, frozenset[str]] = {}
        """For each worker that lacks adapters, the keys of the adapters that it could not load."""

    def set_endpoints(self, endpoints: Sequence[AttentionEndpoint]) -> None:
        """Apply the worker states of a controller snapshot."""
        self.leaving = frozenset(e.name for e in endpoints if e.is_leaving)
        self.groups = {e.name: e.group for e in endpoints}
        self.lacking = {e.name: e.lacks for e in endpoints if e.lacks}

    @property
    def ready(self) -> list[EngineClient]:
        """Clients of connected workers that accept requests, sorted by worker name."""
        return sorted(self._accepting(), key=lambda client: client.worker)

    @property
    def is_any_ready(self) -> bool:
        """Whether a connected worker accepts requests."""
        return any(True for _ in self._accepting())

    def _accepting(self) -> Iterator[EngineClient]:
        clients = self.clients.values()
        return (c for c in clients if c.hello is not None and c.worker not in self.leaving)

    @property
    def submissions(self) -> list[Submission]:
        """All requests that are assigned to a worker."""
        return [entry for client in self.clients.values() for entry in client.submissions]

    def can_run(self, entry: Submission, client: EngineClient) -> bool:
        """Whether a worker has the adapter of a request, or the request needs none."""
        return entry.request.adapter not in self.lacking.get(client.worker, ())

    def can_any_run(self, entry: Submission) -> bool:
        """Whether a worker that accepts requests can run this request."""
        return any(self.can_run(entry, client) for client in self._accepting())

    def has_adapter(self, key: str) -> bool:
        """Whether any worker can run requests with the adapter ``key``, or with the base model if
        ``key`` is empty. True if no connected worker accepts requests.
        """
        if not self.lacking:
            return True
        ready = list(self._accepting())
        return not ready or any(key not in self.lacking.get(c.worker, ()) for c in ready)

    def num_seats(self, max_num_seqs: int) -> int:
        """Number of sequences that all workers together can run: ``max_num_seqs`` per worker, or
        the number of decoding sequences for a worker that is short of KV blocks.
        """
        return sum(client.num_seats(max_num_seqs) for client in self._accepting())
