"""Where workers start in the places of lost ones: handles without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import replace
from typing import Any

import pytest
import ray

from cluster.actors import ray_tools, resource_reservation
from cluster.actors.worker_group import WorkerGroup
from cluster.config.workers import WorkersSection
from cluster.core.errors import StartError
from cluster.core.placement import contiguous
from cluster.core.process import ProcessIdentity
from cluster.core.topology import Member
from cluster.sizing.start_plan import StartPlan
from tests.cluster.controller.fakes_cluster import BANKS, CONFIG

PROCESS = ProcessIdentity(pid=7, started_at=0.0)
POOLS = WorkersSection(num_attention_workers=2)
PLAN = StartPlan(config=replace(CONFIG, workers=POOLS), placement=contiguous(BANKS, 1), num_slots=0)


class Handle:
    """A worker that comes up at once, or was created by an earlier controller."""

    @property
    def __ray_call__(self) -> Any:
        return self

    @property
    def start(self) -> Any:
        return self

    async def remote(self, *args: object) -> tuple[dict[str, Any], ProcessIdentity, str]:
        facts = {"config": CONFIG.to_dict(), "num_slots": 4, "has_called": False}
        return facts, PROCESS, "a node"


class SlowHead:
    """An actor class whose actors are registered at Ray's head when two are asked for, or late."""

    def __init__(self, num_asked: int = 2) -> None:
        self.bundles: list[int] = []
        self._both = threading.Barrier(num_asked)

    def remote(self, *args: object) -> Handle:
        with contextlib.suppress(threading.BrokenBarrierError):
            self._both.wait(0.2)
        return Handle()

    def options(self, **options: Any) -> SlowHead:
        self.bundles.append(options["scheduling_strategy"].placement_group_bundle_index)
        return self


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(group: WorkerGroup, names: object) -> None:
        """No actor has these names."""

    monkeypatch.setattr(WorkerGroup, "_free_names", nothing)
    monkeypatch.setattr(ray_tools, "newest_term", lambda above, but, namespace: 0)


def test_workers_that_start_side_by_side_take_different_places() -> None:
    """Two hosts are lost at once: each place of theirs gets a worker."""
    head = SlowHead()
    group = WorkerGroup({"attention": head})
    group.room._roles = ["attention"] * 2
    group.room._group = object()  # type: ignore[assignment]
    members = [Member(name=f"attention-{i}.2", role="attention", rank=i, device=-1) for i in (0, 1)]

    async def body() -> None:
        starts = (group.start([m], PLAN, "127.0.0.1:1") for m in members)
        await asyncio.gather(*starts)

    asyncio.run(body())
    assert sorted(head.bundles) == [0, 1]


def test_a_name_that_an_earlier_controller_had_used_takes_no_place_of_another_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It died before the new worker had called: the next one gives that name again."""
    monkeypatch.setattr(ray_tools, "live_actor_names", lambda namespace: ["expert-0", "expert-1.2"])
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: Handle())
    monkeypatch.setattr(ray.util, "get_placement_group", lambda name: object())
    bundles = {"bundles_to_node_id": {0: "a node", 1: "a node"}}
    monkeypatch.setattr(resource_reservation, "placement_group_table", lambda group: bundles)
    monkeypatch.setattr(ray_tools, "added_placement_groups", lambda namespace: {})
    head = SlowHead(1)
    group = WorkerGroup({"expert": head})
    member = Member(name="expert-1.2", role="expert", rank=1, device=1)

    async def body() -> None:
        assert len(await group.find(5.0)) == 2
        await group.start([member], PLAN, "127.0.0.1:1")

    asyncio.run(body())
    assert head.bundles == [-1]  # wherever there is room; bundle 0 is that of expert-0


def test_resources_are_released_although_ray_failed_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Group:
        def wait(self, limit_s: float) -> bool:
            raise RuntimeError("the head node is away")

    made, removed = Group(), list[object]()
    monkeypatch.setattr(
        resource_reservation.ResourceReservation, "_added_group", lambda *place: made
    )
    monkeypatch.setattr(resource_reservation, "remove_placement_group", removed.append)
    room = resource_reservation.ResourceReservation()
    with pytest.raises(RuntimeError, match="away"):
        room.add("expert-2", "expert", WorkersSection(has_equal_cpus=True, cpus_per_worker=1.0))
    room.release(["expert-2"])
    assert removed == [made]


def test_a_worker_that_is_not_wanted_any_more_is_not_created() -> None:
    """Its scaling was rolled back before Ray knew of it."""
    head = SlowHead(1)
    group = WorkerGroup({"attention": head})
    group.room._group = object()  # type: ignore[assignment]
    member = Member(name="attention-1", role="attention", rank=1, device=-1)

    async def body() -> None:
        await group.end(["attention-1"])
        with pytest.raises(StartError, match="ended before it was created"):
            await group.start([member], PLAN, "127.0.0.1:1")

    asyncio.run(body())
    assert head.bundles == []
    assert group.names() == []
