"""Copies the KV blocks of sessions to a second worker, so that the loss of one worker does not lose
the cached session.

A request with ``Request.is_retained`` leaves its blocks at the worker that has computed them. When
the request ends, the gateway sends the hashes of the blocks to a second worker. If that worker
lacks many blocks of the prompt, the gateway sends the hashes as soon as the prompt is computed. The
second worker reads the missing blocks from the first worker in the background and keeps them in
host memory. Its block events inform all gateways, which route the session to the second worker
when the first worker is lost or drained. This module keeps no state. The choice depends only on
the session id, the known blocks of each worker and the set of workers, so that all gateways choose
the same worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from msgspec.structs import replace

from gateway.engines.engine_client import EngineClient
from gateway.engines.kv_index import KvIndex
from gateway.engines.submission import Submission
from gateway.engines.worker_registry import WorkerRegistry
from workers.requests.block_hash import SHORT_BYTES, BlockHash, sequence_hashes
from workers.requests.request import Request
from workers.requests.wire import EngineHello, KeepCopy

MIN_EARLY_COPY_BLOCKS = 64
"""Minimum number of prompt blocks missing at the second worker for which the gateway requests a
copy before the request ends. Fewer blocks are soon computed again, and copying in two parts costs
more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyTarget:
    """A worker that can keep copies of the KV blocks of a sequence."""

    name: str
    is_on_other_host: bool
    """Whether this worker is on another host than the worker that has computed the blocks."""
    num_known: int
    """Number of leading KV blocks of the sequence that this worker has."""


def pick_copy_target(keepers: Sequence[CopyTarget], num_prompt: int, key: str) -> CopyTarget | None:
    """Pick the worker for copies of a sequence with ``num_prompt`` prompt blocks.

    Returns None if ``keepers`` is empty. Workers on another host are preferred, then workers that
    have half of the prompt, since they keep the earlier turns. Rendezvous hashing of ``key``
    resolves ties: the keys of a lost worker spread over the remaining workers, and all other keys
    keep their worker.

    Example: b has 0 of 8 blocks and c has 7, both on other hosts: c keeps the copies.
    """

    def rank(keeper: CopyTarget) -> tuple[bool, bool, bytes]:
        weight = blake2b(f"{keeper.name}\0{key}".encode(), digest_size=8).digest()
        return keeper.is_on_other_host, 2 * keeper.num_known >= num_prompt, weight

    return max(keepers, key=rank, default=None)


class SessionCopier:
    """Requests copies of the KV blocks of sessions on a second worker, in case a worker is lost.

    All methods run on the event loop.

    Args:
        workers: the connected workers.
        index: index of the KV blocks that each worker has.
    """

    def __init__(self, workers: WorkerRegistry, index: KvIndex) -> None:
        self._workers = workers
        self._index = index

    def note_prompt(self, entry: Submission, source: EngineClient) -> None:
        """Request copies of the blocks of a long prompt that ``source`` has computed."""
        if entry.block_hashes:
            self._copy(entry, source, entry.block_hashes, at_least=MIN_EARLY_COPY_BLOCKS)

    def note_end(self, entry: Submission, source: EngineClient) -> None:
        """Request copies of the blocks of a request that has ended at ``source``."""
        if entry.block_hashes is not None and source.hello is not None:
            for hashes in _computed(entry, entry.block_hashes, source.hello):
                self._copy(entry, source, hashes)

    def _copy(
        self,
        entry: Submission,
        source: EngineClient,
        hashes: Sequence[BlockHash],
        at_least: int = 0,
    ) -> None:
        """Request a copy of blocks of ``source`` if the chosen worker lacks ``at_least`` blocks."""
        others = {
            c.worker: c for c in self._workers.ready if c is not source and _can_store_copies(c)
        }
        if not others:
            return
        key = _key(entry.request, entry.block_hashes or hashes)
        known = self._index.matches([name[:SHORT_BYTES] for name in hashes])
        keepers = [
            CopyTarget(
                name=name,
                is_on_other_host=client.node != source.node,
                num_known=known.get(name, 0),
            )
            for name, client in others.items()
        ]
        keeper = pick_copy_target(keepers, len(entry.block_hashes or ()), key)
        assert keeper is not None, "there are other workers"
        if len(hashes) - keeper.num_known >= at_least:
            others[keeper.name].stream.send(_message(entry, source.worker, hashes))


def _can_store_copies(client: EngineClient) -> bool:
    return client.hello is not None and client.hello.keeps_copies


def _computed(
    entry: Submission, prompt: Sequence[BlockHash], hello: EngineHello
) -> Iterator[Sequence[BlockHash]]:
    """Yield the hashes of each choice's full blocks whose keys and values are computed."""
    size, limit = hello.kv_block_size, hello.kv_length_matters_above
    request = replace(entry.request, output_so_far=tuple(map(tuple, entry.outputs)))
    for choice, tokens in enumerate(request.output_so_far):
        count = (len(request.prompt) + len(tokens) - 1) // size
        if tokens and count:
            yield sequence_hashes(request, choice, size, limit, prompt)[:count]


def _key(request: Request, hashes: Sequence[BlockHash]) -> str:
    """Return the key of a session: tenant and session id (without one, hash of the last block)."""
    return f"{request.tenant}\0{request.session or hashes[-1].hex()}"


def _message(entry: Submission, source: str, hashes: Sequence[BlockHash]) -> KeepCopy:
    request = entry.request
    return KeepCopy(
        source=source,
        names=b"".join(hashes),
        num_prompt=min(len(entry.block_hashes or ()), len(hashes)),
        tenant=request.tenant,
        session=request.session,
        cache_ttl_s=request.cache_ttl_s,
        priority=request.priority,
        may_outlive=not request.adapter,
    )
