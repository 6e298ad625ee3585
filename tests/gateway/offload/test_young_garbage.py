"""Garbage is collected although hardly any objects are made."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from gateway.offload import young_garbage
from gateway.offload.long_work import GC_PAUSE
from gateway.offload.young_garbage import collect_often


class Node:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def kept_collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def test_young_cycles_are_collected_at_once() -> None:
    async def make() -> None:
        collect_often()
        gone = asyncio.Event()
        weakref.finalize(Node(), gone.set)
        await asyncio.wait_for(gone.wait(), 60)

    asyncio.run(make())


def test_old_cycles_are_collected_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(young_garbage, "_FULL_PERIOD_S", 0.2)

    async def make() -> None:
        collect_often()
        node, gone = Node(), asyncio.Event()
        weakref.finalize(node, gone.set)
        gc.collect()  # it is old now
        del node
        await asyncio.wait_for(gone.wait(), 60)

    asyncio.run(make())


def test_long_work_is_not_disturbed() -> None:
    async def make() -> None:
        gone = asyncio.Event()
        with GC_PAUSE:
            collect_often()
            weakref.finalize(Node(), gone.set)
            await asyncio.sleep(0.2)
            assert not gone.is_set()
        await asyncio.wait_for(gone.wait(), 60)

    asyncio.run(make())
