"""Chooses the worker of each request from the load, KV blocks and sessions of the workers."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.engines.engine_client import EngineClient
from gateway.engines.kv_index import KvIndex
from gateway.engines.router import RoutingPolicy, pick_worker, route_by_kv
from gateway.engines.session_affinity import SessionAffinity
from gateway.engines.submission import Submission
from gateway.engines.worker_registry import WorkerRegistry
from workers.requests.block_hash import block_hashes

FREE_KV_FACTOR = 4
"""Free KV tokens that the target of a move needs, as a multiple of the moving request's tokens.
Other requests may take blocks before the request arrives, and it must not soon move again."""


class RequestRouter:
    """Chooses the attention worker that runs a request.

    Args:
        workers: the workers to choose from.
        policy: routing policy: by cached KV blocks and load, by load only, or round-robin.
    """

    def __init__(self, workers: WorkerRegistry, policy: RoutingPolicy) -> None:
        self._workers = workers
        self._policy = policy
        self._num_routed = 0
        self.kv = KvIndex()
        """Index of the KV blocks that each worker has cached."""
        self._affinity = SessionAffinity()

    def pick(self, entry: Submission, ready: Sequence[EngineClient]) -> EngineClient | None:
        """Choose one of the ``ready`` workers for a request; return None if none can run it.

        The last worker of the request is chosen only if no other worker can run the request.
        """
        clients = {c.worker: c for c in ready if self._workers.can_run(entry, c)}
        if len(clients) > 1:
            clients.pop(entry.last_worker, None)
        if not clients:
            return None
        loads, tokens = [client.load for client in clients.values()], entry.num_known_tokens
        if self._policy is RoutingPolicy.KV:
            size = self._set_block_hashes(entry, ready[0])
            hashes = entry.prompt_hashes
            session_worker = self._affinity.get(entry.request)
            choice = route_by_kv(
                self.kv, hashes, loads, self._num_routed, tokens, size, session_worker
            )
        else:
            choice = pick_worker(loads, self._policy, self._num_routed)
        self._num_routed += 1
        entry.missing_tokens = max(tokens - choice.cached_tokens, 0)
        entry.kv_peer = choice.peer
        self._affinity.put(entry.request, choice.load.name)
        return clients[choice.load.name]

    def pick_with_free_kv(self, entry: Submission, source: EngineClient) -> EngineClient | None:
        """Choose the worker other than ``source`` with the most free KV tokens; None if no worker
        has enough for the request."""
        needed = FREE_KV_FACTOR * entry.num_known_tokens
        others = (
            c
            for c in self._workers.ready
            if c is not source and c.load.free_tokens >= needed and self._workers.can_run(entry, c)
        )
        return max(others, key=lambda client: client.load.free_tokens, default=None)

    def num_missing(self, entry: Submission, ready: Sequence[EngineClient]) -> int:
        """Number of tokens of a request after the longest prefix that any worker has cached.

        Without the ``kv`` policy, all tokens. Sets the block hashes of the request.
        """
        tokens = entry.num_known_tokens
        if self._policy is not RoutingPolicy.KV or not ready:
            return tokens
        block_size = self._set_block_hashes(entry, ready[0])
        matches = self.kv.matches(entry.prompt_hashes)
        return tokens - block_size * max(matches.values(), default=0)

    def _set_block_hashes(self, entry: Submission, client: EngineClient) -> int:
        """Set the block hashes of a request; return the number of tokens per block."""
        hello = client.hello
        assert hello is not None, "only workers with a hello take requests"
        block_size = hello.kv_block_size
        if block_size and not entry.prompt_hashes:
            limit = hello.kv_length_matters_above
            entry.set_hashes(block_hashes(entry.request, block_size, limit))
        return block_size
