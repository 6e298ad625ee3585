"""Expired objects leave the folder while a gateway runs."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from gateway.core.errors import StorageError
from gateway.state.store import StateStore
from gateway.state.sweeper import StateSweeper


class CountingStore(StateStore):
    """Counts sweeps; the first one fails."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, max_objects=1, max_bytes=1 << 20, ttl_s=60.0)
        self.num_sweeps = 0
        self.has_swept_twice = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def sweep(self) -> int:
        self.num_sweeps += 1
        if self.num_sweeps == 1:
            raise StorageError("the disk is gone")
        self._loop.call_soon_threadsafe(self.has_swept_twice.set)
        return super().sweep()


def test_it_goes_on_after_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> int:
        store = CountingStore(tmp_path)
        sweeper = StateSweeper(store, 0.0)
        sweeper.start()
        async with asyncio.timeout(60):
            await store.has_swept_twice.wait()
        await sweeper.stop()
        return store.num_sweeps

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(run()) >= 2
    assert "the disk is gone" in caplog.text


def test_without_a_store_there_is_nothing_to_sweep() -> None:
    async def run() -> None:
        sweeper = StateSweeper(None, 0.0)
        sweeper.start()
        await sweeper.stop()

    asyncio.run(run())
