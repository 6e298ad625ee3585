"""Streams to workers that end and begin while the cluster changes."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway.cluster.view import AttentionEndpoint
from gateway.engines.engine_pool import EnginePool
from gateway.engines.engine_stream import EngineStream
from workers.requests.block_hash import KvEvents

HASH = b"h" * 32


class SlowToEnd(EngineStream):
    """A stream that tells of a block at once, and takes a while to end."""

    async def run(self, take: Any) -> Any:
        await take(KvEvents(number=1, is_whole=True, stored=(HASH,)))
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)


def test_the_end_of_an_old_stream_keeps_the_blocks_of_the_next_one() -> None:
    async def work() -> dict[str, int]:
        pool = EnginePool("", "gateway", connect=lambda e: SlowToEnd(e, token="", gateway="g"))
        for pid in (1, 2):
            pool.update([AttentionEndpoint("attention-0", "127.0.0.1:1", pid)])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        found = dict(pool.kv.matches([HASH]))
        await pool.stop()
        return found

    assert asyncio.run(work()) == {"attention-0": 1}
