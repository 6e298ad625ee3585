"""What a router makes of KV events, by their definition alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(slots=True)
class RouterIndex:
    """The blocks of one worker by name: their tokens from the first one on, and what else names
    them."""

    block_size: int
    blocks: dict[int, tuple[tuple[int, ...], tuple[Any, ...]]] = field(default_factory=dict)
    num_cleared: int = 0
    ranks: set[int | None] = field(default_factory=set)

    def apply(self, payload: bytes) -> None:
        """Take a batch: ``[time, [event, ..], rank]``, an event a map with its kind in ``type``."""
        seconds, events, *rank = msgspec.msgpack.decode(payload)
        assert isinstance(seconds, float)
        self.ranks.add(rank[0] if rank else None)
        for event in events:
            match event.pop("type"):
                case "BlockStored":
                    self._store(**event)
                case "BlockRemoved":
                    assert event["medium"] == "GPU"
                    for name in event["block_hashes"]:
                        del self.blocks[name]
                case "AllBlocksCleared":
                    assert not event
                    self.blocks.clear()
                    self.num_cleared += 1
                case other:
                    raise AssertionError(other)

    def _store(
        self,
        *,
        block_hashes: list[int],
        parent_block_hash: int | None,
        token_ids: list[int],
        block_size: int,
        lora_id: int | None,
        medium: str,
        lora_name: str | None,
        extra_keys: list[list[Any] | None] | None = None,
    ) -> None:
        assert (block_size, medium, lora_id) == (self.block_size, "GPU", None)
        assert len(token_ids) == block_size * len(block_hashes)
        extra = extra_keys or [None] * len(block_hashes)
        assert len(extra) == len(block_hashes)
        tokens: tuple[int, ...] = ()
        keys: tuple[Any, ...] = (lora_name,)
        if parent_block_hash is not None:
            tokens, keys = self.blocks[parent_block_hash]
        for place, name in enumerate(block_hashes):
            assert 0 <= name < 2**64
            assert name not in self.blocks
            tokens += tuple(token_ids[place * block_size : (place + 1) * block_size])
            keys += tuple(extra[place] or ())
            self.blocks[name] = tokens, keys

    def prefixes(self) -> set[tuple[int, ...]]:
        """Tokens of all cached prefixes of full blocks."""
        return {tokens for tokens, _ in self.blocks.values()}
