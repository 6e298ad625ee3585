"""Where workers start in the places of lost ones: handles without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest

from cluster.actors import ray_tools, worker_group
from cluster.actors.process import ProcessIdentity
from cluster.actors.start_plan import StartPlan
from cluster.actors.worker_group import WorkerGroup
from cluster.core.placement import contiguous
from cluster.core.topology import Member
from tests.cluster.controller.fakes_cluster import BANKS, CONFIG


class Handle:
    """A worker that comes up at once."""

    @property
    def __ray_call__(self) -> Any:
        return self

    @property
    def start(self) -> Any:
        return self

    async def remote(self, *args: object) -> tuple[dict[str, Any], ProcessIdentity, str]:
        return {}, ProcessIdentity(pid=7, started_at=0.0), "a node"


class SlowHead:
    """An actor class whose actors are registered at Ray's head when two are asked for, or late."""

    def __init__(self) -> None:
        self.bundles: list[int] = []
        self._both = threading.Barrier(2)

    def remote(self, *args: object) -> Handle:
        with contextlib.suppress(threading.BrokenBarrierError):
            self._both.wait(0.2)
        return Handle()

    def options(self, **options: Any) -> SlowHead:
        self.bundles.append(options["scheduling_strategy"].placement_group_bundle_index)
        return self


def test_workers_that_start_side_by_side_take_different_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two hosts are lost at once: each place of theirs gets a worker."""

    async def nothing(names: object) -> None:
        """No actor has these names."""

    monkeypatch.setattr(worker_group, "_free_names", nothing)
    monkeypatch.setattr(ray_tools, "newest_term", lambda: 0)
    head = SlowHead()
    group = WorkerGroup({"attention": head})
    group._bundles = {"attention": range(2)}
    plan = StartPlan(config=CONFIG, placement=contiguous(BANKS, 1), num_slots=0)
    group._group = object()  # type: ignore[assignment]
    members = [Member(name=f"attention-{i}.2", role="attention", rank=i, device=-1) for i in (0, 1)]

    async def body() -> None:
        starts = (group.start([m], plan, "127.0.0.1:1") for m in members)
        await asyncio.gather(*starts)

    asyncio.run(body())
    assert sorted(head.bundles) == [0, 1]
