"""Chooses the worker of each request from the load, KV blocks and sessions of the workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from gateway.engines.engine_client import EngineClient
from gateway.engines.kv_index import KvIndex
from gateway.engines.router import RoutingPolicy, pick_worker, route_by_kv
from gateway.engines.session_affinity import SessionAffinity
from gateway.engines.submission import Submission
from gateway.engines.worker_registry import WorkerRegistry
from workers.requests.block_hash import block_hashes
from workers.requests.request import MAX_DEATHS

FREE_KV_FACTOR = 4
"""Free KV tokens that the target of a move needs, as a multiple of the moving request's tokens.
Other requests may take blocks before the request arrives, and it must not soon move again."""


_MAX_NEAR_SHARE = 0.25
"""Largest share of a prompt that a decode worker computes, however slow fetches are."""
_MAX_NEAR_TOKENS = 128
"""Largest number of such tokens, which delay a step of the decode group."""


def _of_group(clients: Iterable[EngineClient], group: str) -> list[EngineClient]:
    return [client for client in clients if group and client.group == group]


def _num_needed(entry: Submission, client: EngineClient) -> int:
    """Return the free KV tokens that a worker must have for a request that is handed over."""
    tokens = entry.num_known_tokens
    most = 0 if client.hello is None else client.hello.max_kv_tokens
    return min(FREE_KV_FACTOR * tokens, max(tokens, most // 2))


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

    def pick(
        self, entry: Submission, ready: Sequence[EngineClient], group: str = ""
    ) -> EngineClient | None:
        """Choose one of the ``ready`` workers for a request; return None if none can run it.

        The last worker of the request is chosen only if it is the only one left. ``group``: step
        group of the worker, if any of them can run the request. By default, a worker of the prefill
        group computes the prompt, unless one of the decode group has almost all of its blocks.
        """
        able = [c for c in ready if self._workers.can_run(entry, c)]
        able = _of_group(able, group) or self._to_compute(entry, able)
        clients = {client.worker: client for client in able}
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

    def pick_to_decode(
        self, entry: Submission, coming: Counter[EngineClient]
    ) -> EngineClient | None:
        """Choose the worker of the decode group that a computed prompt moves to: the one with the
        fewest tokens to serve, of those with enough free KV. None without such a worker.

        ``coming``: tokens of the requests that are moving to a worker.
        """
        able = [
            client
            for client in _of_group(self._workers.ready, "decode")
            if self._workers.can_run(entry, client)
            and client.load.free_tokens >= _num_needed(entry, client) + coming[client]
        ]
        chosen = min(able, key=lambda c: c.load.outstanding_tokens + coming[c], default=None)
        if chosen is not None:
            self._affinity.put(entry.request, chosen.worker)
        return chosen

    def is_handed_over(self, entry: Submission, client: EngineClient) -> bool:
        """Whether a request moves to a decode worker once ``client`` has computed its prompt."""
        return self.may_leave(entry, client) and self._is_any_in("decode", entry)

    def may_leave(self, entry: Submission, client: EngineClient) -> bool:
        """Whether a request should leave ``client`` for any decode worker after its next token.

        A request that was a suspect stays: its decode rows may be what kills workers.
        """
        params, embeds = entry.request.params, entry.request.prompt_embeds
        if client.group != "prefill" or params.beams is not None or embeds is not None:
            return False
        longest = max((len(entry.outputs[choice]) for choice in entry.open_choices), default=0)
        is_suspect = entry.was_suspect or entry.num_deaths >= MAX_DEATHS
        return params.max_tokens > 1 + longest and not is_suspect

    def must_leave_to_run_alone(self, entry: Submission, client: EngineClient) -> bool:
        """Whether a suspect must run on a prefill worker, since only one step group may run steps
        of suspects: if both did, the death of an expert worker would be blamed on both.
        """
        return client.group == "decode" and self._is_any_in("prefill", entry)

    def _is_any_in(self, group: str, entry: Submission) -> bool:
        return any(
            client.group == group and self._workers.can_run(entry, client)
            for client in self._workers.ready
        )

    def _to_compute(self, entry: Submission, able: list[EngineClient]) -> list[EngineClient]:
        """Return the workers among which to choose for the prompt of a request.

        A decode worker computes what it lacks of a prompt if this takes no longer than to fetch the
        blocks of the whole prompt, by its measured ``fetch_cost``, and also if it is one block.
        """
        prefill, decode = _of_group(able, "prefill"), _of_group(able, "decode")
        if not prefill or not decode or entry.is_suspect:
            return prefill or able
        if self._policy is not RoutingPolicy.KV:
            return prefill
        size, tokens = self._set_block_hashes(entry, decode[0]), entry.num_known_tokens
        matches = self.kv.matches(entry.prompt_hashes)
        most = min(tokens * _MAX_NEAR_SHARE, _MAX_NEAR_TOKENS)
        near = [
            client
            for client in decode
            if tokens - matches.get(client.worker, 0) * size
            <= max(size, min(tokens * client.load.fetch_cost, most))
        ]
        return near or prefill

    def pick_with_free_kv(self, entry: Submission, source: EngineClient) -> EngineClient | None:
        """Choose the worker other than ``source`` with the most free KV tokens, in the decode group
        if there is one; None if no worker has enough for the request."""
        needed, ready = FREE_KV_FACTOR * entry.num_known_tokens, self._workers.ready
        others = (
            c
            for c in _of_group(ready, "decode") or ready
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
