"""Copies of the KV blocks of sessions at a second worker: a session survives the loss of its own.

A request whose blocks are wanted later (``Request.is_kept``) leaves them at the worker that has
computed them. When it has ended, another worker is told which blocks these are. If that one lacks
many blocks of the prompt, it is told already when the prompt is computed. It reads those that it
lacks from the first worker, in the background, and keeps them in host memory. Its block events tell
all gateways: requests go there by themselves when the first worker is lost or drained.

Nothing is remembered here. The choice follows from the session's name, from the blocks that each
worker is known to have, and from the workers that there are, so all gateways make the same one.
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

MANY_BLOCKS = 64
"""Blocks of a prompt that are copied before the end of its request: few ones are soon computed, and
copying them twice in parts costs more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyTarget:
    """A worker that could keep copies."""

    name: str
    is_elsewhere: bool
    """On another host than the worker that has the blocks."""
    num_known: int
    """Blocks of the sequence, from the first on, that it has."""


def pick_keeper(keepers: Sequence[CopyTarget], num_prompt: int, key: str) -> CopyTarget | None:
    """The worker for copies of a sequence whose prompt has so many blocks; None: there is none.

    Those on another host come first, then those that have half of the prompt: they have kept the
    turns before. Equal ones share the keys by rendezvous hashing, so that the keys of one that is
    lost spread over the others, and all other keys stay where they are.

    Example: of b with 0 of 8 blocks and c with 7, both on other hosts, c keeps the copies.
    """

    def rank(keeper: CopyTarget) -> tuple[bool, bool, bytes]:
        weight = blake2b(f"{keeper.name}\0{key}".encode(), digest_size=8).digest()
        return keeper.is_elsewhere, 2 * keeper.num_known >= num_prompt, weight

    return max(keepers, key=rank, default=None)


class SessionCopies:
    """Has the blocks of sessions copied. Event loop only.

    Args:
        workers: the streams to workers that take requests.
        index: which worker has which blocks.
    """

    def __init__(self, workers: WorkerRegistry, index: KvIndex) -> None:
        self._workers = workers
        self._index = index

    def note_prompt(self, entry: Submission, source: EngineClient) -> None:
        """A worker has computed a request's prompt."""
        if entry.block_hashes:
            self._copy(entry, source, entry.block_hashes, at_least=MANY_BLOCKS)

    def note_end(self, entry: Submission, source: EngineClient) -> None:
        """A request has ended at a worker."""
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
        """Ask for a copy, if so many blocks are missing there."""
        others = {c.worker: c for c in self._workers.ready if c is not source and _can_keep(c)}
        if not others:
            return
        key = _key(entry.request, entry.block_hashes or hashes)
        known = self._index.matches([name[:SHORT_BYTES] for name in hashes])
        keepers = [
            CopyTarget(
                name=name,
                is_elsewhere=client.node != source.node,
                num_known=known.get(name, 0),
            )
            for name, client in others.items()
        ]
        keeper = pick_keeper(keepers, len(entry.block_hashes or ()), key)
        assert keeper is not None, "there are other workers"
        if len(hashes) - keeper.num_known >= at_least:
            others[keeper.name].stream.send(_message(entry, source.worker, hashes))


def _can_keep(client: EngineClient) -> bool:
    return client.hello is not None and client.hello.keeps_copies


def _computed(
    entry: Submission, prompt: Sequence[BlockHash], hello: EngineHello
) -> Iterator[Sequence[BlockHash]]:
    """By choice, the full blocks whose keys and values are there: of all tokens but the newest."""
    size, limit = hello.kv_block_size, hello.kv_length_matters_above
    request = replace(entry.request, output_so_far=tuple(map(tuple, entry.outputs)))
    for choice, tokens in enumerate(request.output_so_far):
        count = (len(request.prompt) + len(tokens) - 1) // size
        if tokens and count:
            yield sequence_hashes(request, choice, size, limit, prompt)[:count]


def _key(request: Request, hashes: Sequence[BlockHash]) -> str:
    """What tells sessions apart: the name, or the prompt of one without a name."""
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
