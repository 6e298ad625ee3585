"""Events about cached KV blocks for routers of other projects, in vLLM's format. Pure.

A batch is a msgpack array of its time, its events and the publisher's rank; an event is a map with
its kind in ``type``. This is the format of vLLM 0.24 to 0.33; until 0.23 an event was an array.
The routers of Dynamo and llm-d read both. Block hashes are integers of 64 bits, which is vLLM's
default. Routers use them only as names; they hash the tokens themselves.

Source: ``vllm/distributed/kv_events.py`` of vLLM 0.33. Here the name of a block is the first 64
bits of our hash, and the medium is always ``GPU``, as it is for vLLM on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from workers.kv.block_pool import HashChanges
from workers.requests.block_hash import SHORT_BYTES, BlockHash
from workers.requests.request import Request

MEDIUM = "GPU"
"""Value of ``medium`` in all events: the memory from which attention reads the blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockContent:
    """Tokens of a cached block, and the other inputs of its hash."""

    parent: BlockHash | None
    """Hash of the block before it; None for the first block."""
    token_ids: tuple[int, ...]
    extra: tuple[str, ...] = ()
    """In the first block, inputs of the hash other than tokens and adapter: tenant and salt, digest
    of given embeddings, and the prompt length if keys depend on it."""
    adapter: str = ""
    """Key of the adapter that computed the keys and values; empty without an adapter."""


class RouterEvent(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all events."""


class BlockStored(RouterEvent, frozen=True, kw_only=True):
    """New cached blocks, each the successor of the one before."""

    block_hashes: list[int]
    parent_block_hash: int | None
    """Hash of the block before the first one; None at the start of a prefix."""
    token_ids: list[int]
    """Tokens of all blocks, in order."""
    block_size: int
    lora_id: int | None
    """Deprecated; always None."""
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None
    """For each block, inputs of the hash other than tokens."""


class BlockRemoved(RouterEvent, frozen=True, kw_only=True):
    """Blocks that are no longer cached."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(RouterEvent, frozen=True, kw_only=True):
    """No block is cached."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """The events of a step."""

    ts: float
    """Seconds since 1970."""
    events: list[Event]
    data_parallel_rank: int | None = None
    """The attention rank."""


def extra_of(request: Request, length_matters_above: int | None) -> tuple[str, ...]:
    """Return ``BlockContent.extra`` for the first block of a request; see ``request_root``."""
    embeds, length = request.prompt_embeds, len(request.prompt)
    matters = length_matters_above is not None and length > length_matters_above
    found = (
        request.cache_salt,
        "" if embeds is None else f"embeddings {embeds.digest}",
        f"length {length}" if matters else "",
    )
    return tuple(filter(None, found))


class RouterFeed:
    """Converts changes of the cache to events and tracks the blocks that were announced.

    A block fetched from another worker or restored from a tier is announced when a request first
    uses it, as its tokens are unknown before.

    Args:
        block_size: number of tokens of a block.
        adapters: returns the names of adapters by key.
    """

    def __init__(self, block_size: int, adapters: Callable[[], Mapping[str, str]] = dict) -> None:
        self._block_size = block_size
        self._adapters = adapters
        self._told: set[BlockHash] = set()
        self._untold: set[BlockHash] = set()

    def clear(self) -> list[Event]:
        """Return an event that removes all blocks; blocks cached now are not announced again."""
        self._told.clear()
        self._untold.clear()
        return [AllBlocksCleared()]

    def change(
        self, changes: HashChanges, contents: Mapping[BlockHash, BlockContent]
    ) -> list[Event]:
        """Return the events of a step.

        ``contents``: the known contents of new blocks, and of fetched or restored blocks that a
        request used for the first time.
        """
        self._untold.update(h for h in changes.stored if h not in contents)
        first_used = [h for h in contents if h in self._untold]
        self._untold.difference_update(first_used)
        new = [h for h in (*first_used, *changes.stored) if h in contents and h not in self._told]
        events: list[Event] = list(self._stored(list(dict.fromkeys(new)), contents))
        self._told.update(new)
        self._untold.difference_update(changes.removed)
        if removed := [h for h in changes.removed if h in self._told]:
            self._told.difference_update(removed)
            events.append(BlockRemoved(block_hashes=[*map(_name, removed)], medium=MEDIUM))
        return events

    def _stored(
        self, hashes: Sequence[BlockHash], contents: Mapping[BlockHash, BlockContent]
    ) -> Iterator[BlockStored]:
        """Yield one event for each chain of consecutive blocks."""
        chain: list[BlockHash] = []
        for block_hash in hashes:
            content = contents[block_hash]
            if chain and (content.parent, content.adapter) != (
                chain[-1],
                contents[chain[-1]].adapter,
            ):
                yield self._event(chain, contents)
                chain = []
            chain.append(block_hash)
        if chain:
            yield self._event(chain, contents)

    def _event(
        self, chain: Sequence[BlockHash], contents: Mapping[BlockHash, BlockContent]
    ) -> BlockStored:
        found = [contents[block_hash] for block_hash in chain]
        key, parent = found[0].adapter, found[0].parent
        name = self._adapters().get(key, key) if key else None
        named = () if name is None else (name,)
        extra = [(*named, *content.extra) or None for content in found]
        return BlockStored(
            block_hashes=[*map(_name, chain)],
            parent_block_hash=None if parent is None else _name(parent),
            token_ids=[token for content in found for token in content.token_ids],
            block_size=self._block_size,
            lora_id=None,
            medium=MEDIUM,
            lora_name=name,
            extra_keys=extra if any(extra) else None,
        )


def _name(block_hash: BlockHash) -> int:
    return int.from_bytes(block_hash[:SHORT_BYTES], "big")
