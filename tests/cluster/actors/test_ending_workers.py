"""Which processes a worker group ends and starts, and which it must not: handles without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from ray import NodeID
from ray.exceptions import RayTaskError

from cluster.actors import ray_tools, worker_actor
from cluster.actors.worker_actor import ActorCalls
from cluster.actors.worker_group import WorkerGroup
from cluster.core.errors import SupersededError
from cluster.core.placement import contiguous
from cluster.core.process import ProcessIdentity
from cluster.core.topology import Member
from cluster.sizing.start_plan import StartPlan
from tests.cluster.controller.fakes_cluster import BANKS, CONFIG
from workers.process.control.lease import TermGuard

PLAN = StartPlan(config=CONFIG, placement=contiguous(BANKS, 1), num_slots=0)
NODE = NodeID.from_random().hex()
PROCESS = ProcessIdentity(pid=7, started_at=0.0)


@dataclass
class Handle:
    """The handle of a worker that follows the newest term.

    A frozen one never answers, by the group's limit; a slow one has not answered yet.
    """

    is_frozen: bool = False
    is_slow: bool = False
    guard: TermGuard = field(default_factory=TermGuard)
    is_stopped: bool = False

    @property
    def stop(self) -> Any:
        return self

    def remote(self, term: int, controller: str) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.is_frozen:
            future.set_exception(TimeoutError())
            return future
        if self.is_slow:
            return future
        try:
            self.guard.check(term, controller)
        except SupersededError as err:
            told: Any = RayTaskError
            future.set_exception(told("stop", "", err))
        else:
            self.is_stopped = True
            future.set_result(None)
        return future


@dataclass
class Killed:
    """The kills that were asked of Ray and of the kernel."""

    actors: list[Any] = field(default_factory=list)
    processes: list[ProcessIdentity] = field(default_factory=list)
    newest_term: int = 1


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Killed:
    found = Killed()

    def kill(handle: Any, no_restart: bool) -> None:
        found.actors.append(handle)

    def newest_term(above: int, but: str, namespace: str) -> int:
        return found.newest_term if found.newest_term > above else 0

    monkeypatch.setattr(ray_tools, "newest_term", newest_term)
    monkeypatch.setattr(ray_tools, "claim_term", lambda identity, namespace: 1)
    monkeypatch.setattr(ray_tools, "this_node_id", lambda: NODE)
    monkeypatch.setattr(worker_actor, "wait_gone", lambda process, limit_s: True)
    monkeypatch.setattr(worker_actor, "kill_process", found.processes.append)
    monkeypatch.setattr(ray, "kill", kill)
    return found


async def _group(handle: Handle) -> WorkerGroup:
    group = WorkerGroup({})
    actor = ActorCalls("expert-0", handle, NODE, process=PROCESS)
    group._actors["expert-0"] = actor
    await group.claim("a controller")
    return group


def test_a_worker_is_ended_by_its_own_controller(killed: Killed) -> None:
    async def body() -> None:
        handle = Handle()
        await (await _group(handle)).end(["expert-0"])
        assert handle.is_stopped
        assert (killed.actors, killed.processes) == ([handle], [])

    asyncio.run(body())


def test_a_worker_that_follows_a_newer_controller_lives(killed: Killed) -> None:
    """Ray's tables cannot be reached by the older one."""

    async def body() -> None:
        handle = Handle()
        handle.guard.check(2, "another one")
        with pytest.raises(SupersededError, match="the older term 1"):
            await (await _group(handle)).end(["expert-0"])
        assert (killed.actors, killed.processes) == ([], [])

    asyncio.run(body())


def test_a_frozen_worker_is_killed_by_the_newest_controller_only(killed: Killed) -> None:
    async def body() -> None:
        group = await _group(Handle(is_frozen=True))
        killed.newest_term = 2
        with pytest.raises(SupersededError, match="term 2 is claimed"):
            await group.end(["expert-0"])
        assert (killed.actors, killed.processes) == ([], [])
        killed.newest_term = 1
        await group.end(["expert-0"])
        assert killed.processes == [PROCESS]

    asyncio.run(body())


def test_an_end_that_was_cancelled_can_be_repeated(
    killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handoff has a limit, and is tried again."""
    monkeypatch.setattr(ray_tools, "remove_placement_groups", lambda namespace: None)

    async def body() -> None:
        group, handle = await _group(Handle()), Handle(is_slow=True)
        group._actors["expert-0"].handle = handle
        end = asyncio.ensure_future(group.end_all())
        while not group._ending:
            await asyncio.sleep(0)
        end.cancel()
        with pytest.raises(asyncio.CancelledError):
            await end
        handle.is_slow = False
        await group.end_all()
        assert handle.is_stopped

    asyncio.run(body())


def test_an_end_that_fails_does_not_forget_the_next_worker_of_that_name(killed: Killed) -> None:
    """The name was freed, and given again, before Ray's head stopped to answer."""

    async def body() -> None:
        group = await _group(Handle())
        killed.newest_term = 2
        end = asyncio.ensure_future(group.end(["expert-0"]))
        await asyncio.sleep(0)
        successor = ActorCalls("expert-0", Handle(), NODE, process=PROCESS)
        group._actors["expert-0"] = successor
        with pytest.raises(SupersededError):
            await end
        assert group._actors["expert-0"] is successor

    asyncio.run(body())


def test_only_the_newest_controller_starts_workers(
    killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest one may have started a worker of that name."""
    monkeypatch.setattr(ray_tools, "live_actor_names", lambda namespace: ["expert-0.2"])
    monkeypatch.setattr(
        ray_tools, "kill_actors", lambda names, namespace: killed.actors.extend(names)
    )

    async def body() -> None:
        group = await _group(Handle())
        killed.newest_term = 2
        member = Member(name="expert-0.2", role="expert", rank=0, device=0)
        with pytest.raises(SupersededError, match="term 2 is claimed"):
            await group.start([member], PLAN, "here:1")
        assert killed.actors == []

    asyncio.run(body())


@pytest.mark.parametrize("is_here", [True, False])
def test_a_head_that_does_not_answer_holds_nobody_up(
    is_here: bool, killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's calls wait for its head for minutes; frames are handled meanwhile."""
    called, handled = threading.Event(), threading.Event()
    waited_with_others: list[bool] = []

    def wait() -> None:
        called.set()
        waited_with_others.append(handled.wait(5.0))

    class Ray:
        """Kills an actor, or exports and starts the task that kills a process elsewhere."""

        def __call__(self, *details: Any, **options: Any) -> Ray:
            if options:
                wait()
            return self

        def options(self, **options: Any) -> Ray:
            return self

        async def result(self) -> None:
            pass

        def remote(self, *details: Any) -> Coroutine[Any, Any, None]:
            wait()
            return self.result()

    async def body() -> None:
        group = await _group(Handle(is_frozen=not is_here))
        if not is_here:
            monkeypatch.setattr(ray_tools, "this_node_id", lambda: "another")
        monkeypatch.setattr(ray, "kill" if is_here else "remote", Ray())
        end = asyncio.ensure_future(group.end(["expert-0"]))
        while not (called.is_set() or end.done()):
            await asyncio.sleep(0)
        handled.set()
        await end

    asyncio.run(body())
    assert waited_with_others == [True]
