"""KV blocks of paused requests, which other workers can copy while a step runs.

A request that pauses will continue at another worker, and its client waits. Its blocks are held
from the pause until the last one is copied, at most ``KEEP_S`` after the request has left, so that
the threads of the KV server need not wait for the engine thread, which may run a long step with
other prompts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field

from workers.kv.transfer.store import KvTransferStore
from workers.requests.block_hash import BlockHash

KEEP_S = 2.0
"""Seconds for which blocks are held after their request has left, if the last one is not copied."""


@dataclass(slots=True, eq=False)
class Offer:
    """The held blocks of one paused request."""

    blocks: dict[bytes, int]
    """Held blocks by hash."""
    held: list[list[int]]
    """Lists of ``blocks`` that the store holds."""
    num_readers: int = 0
    """Number of copies that are under way."""
    copied: list[int] = field(default_factory=list)
    """Blocks that other workers have copied."""
    left_s: float | None = None
    """Time on the clock at which the request was found to have left; None while it is paused."""

    def is_over(self, now_s: float) -> bool:
        """Whether no other worker needs the blocks any more."""
        last = next(reversed(self.blocks.values()))
        return self.left_s is not None and (last in self.copied or now_s > self.left_s + KEEP_S)


@dataclass(frozen=True, slots=True)
class OfferedBlock:
    """A block of an offer, while a thread copies it."""

    offer: Offer
    block: int


class OfferedBlocks:
    """The offers of one worker. Any thread may call ``take`` and ``give_back``; only the engine
    thread may call the other methods.
    """

    def __init__(self, store: KvTransferStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._offers: dict[str, Offer] = {}
        self._withdrawn: list[Offer] = []

    def put(self, request_id: str, chains: Sequence[Sequence[BlockHash]]) -> None:
        """Offer the computed blocks of a paused request.

        ``chains``: hashes of the full blocks of each of its sequences, from the first block on.
        """
        held = [self._store.acquire(chain) for chain in chains]
        pairs = zip(chains, held, strict=True)
        blocks = {k: b for keys, own in pairs for k, b in zip(keys, own, strict=False)}
        if not blocks:
            return
        with self._lock:
            if (former := self._offers.pop(request_id, None)) is not None:
                self._withdrawn.append(former)
            self._offers[request_id] = Offer(blocks, [own for own in held if own])

    def keep_only(self, request_ids: Set[str]) -> None:
        """Withdraw the offers of other requests that are over, and release blocks that no one
        copies. ``request_ids``: the paused requests."""
        if not self._offers and not self._withdrawn:
            return
        now_s = self._clock()
        with self._lock:
            for name in self._offers.keys() - request_ids:
                offer = self._offers[name]
                offer.left_s = now_s if offer.left_s is None else offer.left_s
                if offer.is_over(now_s):
                    self._withdrawn.append(self._offers.pop(name))
            ended = [offer for offer in self._withdrawn if not offer.num_readers]
            self._withdrawn = [offer for offer in self._withdrawn if offer.num_readers]
        for offer in ended:
            self._store.pool.mark_duplicated(offer.copied)
            for blocks in offer.held:
                self._store.release(blocks, 0)

    def take(self, keys: Sequence[bytes]) -> list[OfferedBlock]:
        """Return the blocks of ``keys`` if one offer has all of them; else an empty list.

        Call ``give_back`` afterwards, unless the list is empty.
        """
        wanted = set(keys)
        with self._lock:
            offers = (o for o in self._offers.values() if o.blocks.keys() >= wanted)
            if (offer := next(offers, None)) is None:
                return []
            offer.num_readers += 1
        return [OfferedBlock(offer, offer.blocks[key]) for key in keys]

    def give_back(self, offer: Offer, copied: Iterable[int]) -> None:
        """End the copying of blocks of an offer. ``copied``: those that another worker keeps."""
        with self._lock:
            offer.copied += copied
            offer.num_readers -= 1
