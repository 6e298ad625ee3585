"""Starts, watches and ends the worker actors.

The actor classes are arguments, as this package never imports the engine. A worker actor is created
as ``Cls(config: dict, member: dict, control_address: str, extra: dict)`` and has ``start()``,
``ping()``, ``describe()``, ``log()``, ``redirect()`` and ``stop()``. All other communication uses
the control socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from cluster.actors import ray_tools, worker_actor
from cluster.actors.resource_reservation import ANY_BUNDLE, ResourceReservation
from cluster.actors.worker_actor import ActorCalls
from cluster.config.cluster import ClusterConfig
from cluster.config.resources import NodeResources, WorkerShare
from cluster.config.workers import WorkersSection
from cluster.core.errors import StartError, SupersededError, UnknownNameError
from cluster.core.fleets import NAMESPACE
from cluster.core.topology import Member, Role
from cluster.policy.places import place_of
from cluster.sizing.start_plan import ExistingWorker, StartPlan

logger = logging.getLogger(__name__)

_PING_S = 0.5
_POLL_S = 0.05


@dataclass(slots=True)
class WorkerGroup:
    """All worker actors of one cluster. The launcher creates it; the controller actor owns it."""

    classes: Mapping[Role, Any]
    """Actor class of each role, plain or decorated with ``ray.remote``."""
    stop_limit_s: float = 2.0
    """Longest time that a worker's ``stop`` may take, in seconds."""
    room: ResourceReservation = field(default_factory=ResourceReservation)
    """Resources reserved for the workers."""
    namespace: str = NAMESPACE
    """Ray namespace of the fleet."""
    _actors: dict[str, ActorCalls] = field(default_factory=dict)
    _ending: set[asyncio.Future[None]] = field(default_factory=set)
    _term: int = 0
    _identity: str = ""
    _placing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock that is held while an actor's bundle is chosen and the actor is created."""
    _remote_classes: dict[Role, Any] = field(default_factory=dict)
    """Remote class (``ray.remote``) of each role, created once: Ray's GCS keeps every one."""
    _withdrawn: set[str] = field(default_factory=set)
    """Names of workers that were ended before their actors were created."""

    # called by the controller actor, which tests run without Ray
    address = staticmethod(ray_tools.node_address)
    was_restarted = staticmethod(ray_tools.this_actor_was_restarted)
    call_back = staticmethod(ray_tools.call_this_actor)

    draining_nodes = staticmethod(ray_tools.draining_nodes)

    def __post_init__(self) -> None:
        self.room.namespace = self.namespace

    def node_ids_by_worker(self) -> dict[str, str]:
        """Return Ray's node id of each worker by worker name; empty while unknown."""
        return {name: actor.node_id for name, actor in list(self._actors.items())}

    def resources(self) -> tuple[NodeResources, ...]:
        """Return the live nodes of the Ray cluster. Blocks on a remote call; use a thread."""
        return ray_tools.cluster_nodes()

    def added_places(self) -> set[str]:
        """Return the worker places that scaling has added, for which resources are reserved."""
        return self.room.added_places()

    def end_this_process(self) -> None:
        os._exit(1)

    async def claim(self, identity: str) -> int:
        """Claim and return the next term for the controller ``identity``.

        Later calls to workers contain the term.

        Raises ``TimeoutError`` if Ray does not reply.
        """
        self._term = await worker_actor.in_time(ray_tools.claim_term, identity, self.namespace)
        self._identity = identity
        return self._term

    async def check_term(self) -> None:
        """Raise ``SupersededError`` if another controller has a newer term."""
        newest = await worker_actor.in_time(
            ray_tools.newest_term, self._term, self._identity, self.namespace
        )
        if newest:
            raise SupersededError(f"term {newest} is claimed, this controller has {self._term}")

    def reserve(self, workers: WorkersSection, limit_s: float) -> tuple[Member, ...]:
        """Reserve resources for all workers. Blocks; use a thread.

        See ``ResourceReservation.reserve``.
        """
        return self.room.reserve(workers, limit_s)

    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        """Create the worker actors and call their ``start``.

        After a failure the caller must end the actors. A place that scaling adds gets a placement
        group of its own. A replacement worker uses the bundle of a lost worker once that bundle is
        free. Raises ``StartError`` with the error text of the first worker that fails, and
        ``SupersededError`` if another controller has a newer term.
        """
        await self.check_term()
        await self._free_names([m.name for m in members])
        created = []
        for member in members:
            node_id = self.room.nodes.get(member.name, "")
            remote = self._remote_class(member.role)
            async with self._placing:
                self._check_wanted(member.name)
                workers, share, bundle = plan.config.workers, plan.share, ANY_BUNDLE
                if member.rank >= workers.pools.get(member.role, 0):
                    place = place_of(member.name)
                    share = await asyncio.to_thread(self.room.add, place, member.role, workers)
                else:
                    taken = {a.bundle for a in self._actors.values()}
                    bundle = self.room.bundle_for(member.name, member.role, taken)
                create: Any = remote.options(**self._options(member, share, bundle)).remote
                await self.check_term()
                facts: Any = plan.arguments(member, address)
                handle = await asyncio.to_thread(create, *facts)  # registers the name at Ray's head
                actor = ActorCalls(member.name, handle, node_id, bundle)
                self._actors[member.name] = actor
            if member.name in self._withdrawn:
                await self.end([member.name])
                self._check_wanted(member.name)
            created.append(actor.start())
        await _all_or_first_error(created)

    async def watch_creation(self, names: Sequence[str], on_process: Callable[[str], None]) -> None:
        """Call ``on_process`` for each named worker once the worker has a process.

        The caller cancels this call after ``start``. The constructor of a reported worker may still
        run. A worker that waits for resources has no process.
        """
        waiting = list(names)
        while waiting:
            await asyncio.sleep(_PING_S)
            handles = {n: self._actors[n].handle for n in waiting if n in self._actors}
            with contextlib.suppress(RayError):
                for name in await asyncio.to_thread(ray_tools.with_process, handles):
                    waiting.remove(name)
                    on_process(name)

    async def watch(
        self, is_connected: Callable[[str], bool], on_died: Callable[[str, str], None]
    ) -> None:
        """Call ``on_died`` for workers that die before they connect.

        Returns once every worker has connected or died.
        """
        waiting = list(self._actors.values())
        while waiting:
            await asyncio.sleep(_PING_S)
            waiting = [a for a in waiting if not is_connected(a.name)]
            for actor in list(waiting):
                words = await actor.death()
                if words is not None:
                    waiting.remove(actor)
                    on_died(actor.name, words)

    async def find(self, limit_s: float) -> tuple[ExistingWorker, ...]:
        """Find the live workers of an earlier controller by name.

        A worker that does not reply within ``limit_s`` is not returned, but ``names`` and ``end``
        include it. Raises ``TimeoutError`` if no worker replies, or if Ray does not.
        """
        self._actors.clear()
        async with asyncio.timeout(limit_s):
            names = await asyncio.to_thread(ray_tools.live_actor_names, self.namespace)
        names = [n for n in names if n.partition("-")[0] in self.classes]
        asked = await asyncio.gather(*(self._find(name, limit_s) for name in names))
        found = tuple(f for f in asked if f is not None)
        if self._actors and not found:
            raise TimeoutError(f"no answer from {', '.join(self._actors)}")
        if found:
            async with asyncio.timeout(limit_s):
                await asyncio.to_thread(self.room.find)
        return found

    def names(self) -> list[str]:
        """Return the names of workers that were started or found and not ended.

        Workers that do not reply are included.
        """
        return list(self._actors)

    async def log(self, name: str, after: int) -> tuple[int, list[str]]:
        """Return the number of all log lines of a worker, and the lines after line ``after``.

        Raises ``UnknownNameError``, and ``NotReadyError`` if the worker does not reply.
        """
        if name not in self._actors:
            raise UnknownNameError(f"no worker {name[:64]!r} runs")
        return await self._actors[name].log(after)

    async def redirect(self, name: str, control_address: str) -> None:
        """Send a worker that ``find`` has found the address of this controller.

        Raises ``SupersededError``, ``ProcessLookupError`` if the worker has died, and Ray's errors.
        """
        await self._actors[name].redirect(control_address, self._term, self._identity)

    async def end(self, names: Sequence[str]) -> None:
        """End these workers: first by their ``stop``, then through Ray and by process id.

        Raises ``SupersededError`` if another controller has a newer term, and ``TimeoutError`` if
        Ray does not reply to the check of the term.
        """
        self._withdrawn.update(n for n in names if n not in self._actors)  # may still be created
        actors = [self._actors.pop(n) for n in names if n in self._actors]
        tasks = [asyncio.ensure_future(self._end_actor(a)) for a in actors]
        self._ending.update(tasks)
        for actor, task in zip(actors, tasks, strict=True):
            task.add_done_callback(partial(self._ended, actor))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for error in (e for e in found if e is not None):
            raise error

    async def end_all(self) -> None:
        """End every worker and release the reserved resources.

        Raises ``SupersededError`` if another controller has a newer term.
        """
        await self.check_term()
        await self.end(self.names())
        await asyncio.gather(*self._ending)
        await worker_actor.in_time(ray_tools.remove_placement_groups, self.namespace)

    async def release(self, places: Sequence[str]) -> None:
        """Release resources of worker places that scaling has removed.

        Raises ``SupersededError`` if another controller has a newer term.
        """
        await self.check_term()
        async with self._placing:
            await worker_actor.in_time(self.room.release, places)

    def _remote_class(self, role: Role) -> Any:
        if role not in self._remote_classes:
            kind = self.classes[role]
            self._remote_classes[role] = kind if hasattr(kind, "remote") else ray.remote(kind)
        return self._remote_classes[role]

    def _check_wanted(self, name: str) -> None:
        """Raise ``StartError`` if the worker was ended before it was created."""
        if name in self._withdrawn:
            raise StartError(name, "it was ended before it was created")

    async def _find(self, name: str, limit_s: float) -> ExistingWorker | None:
        try:
            async with asyncio.timeout(limit_s):
                handle = await asyncio.to_thread(ray.get_actor, name, namespace=self.namespace)
                actor = self._actors[name] = ActorCalls(name, handle, "")
                while True:
                    with contextlib.suppress(ActorUnavailableError):  # only this call is lost
                        answer = await actor.introduce()
                        break
                    await asyncio.sleep(_POLL_S)
        except (TimeoutError, RayError, ValueError) as err:
            logger.warning("could not find %s again: %s", name, type(err).__name__)
            if not isinstance(err, TimeoutError):
                self._actors.pop(name, None)
            return None
        return ExistingWorker(
            name=name,
            config=ClusterConfig.from_dict(answer["config"]),
            num_slots=int(answer["num_slots"]),
            has_connected=bool(answer["has_called"]),
        )

    def _options(self, member: Member, share: WorkerShare, bundle: int) -> dict[str, Any]:
        return {
            "name": member.name,
            "namespace": self.namespace,
            "lifetime": "detached",
            "num_cpus": share.cpus,
            "num_gpus": share.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 4,  # so that ping and stop run during another call
            "scheduling_strategy": self.room.strategy(place_of(member.name), bundle),
        }

    async def _end_actor(self, actor: ActorCalls) -> None:
        is_stopped = await actor.stop(self._term, self._identity, self.stop_limit_s)
        await self.check_term()
        await actor.kill(is_stopped)

    async def _free_names(self, names: Sequence[str]) -> None:
        """Kill an earlier run's actors with these names.

        Raises ``StartError`` if one does not end.
        """
        deadline = asyncio.get_running_loop().time() + worker_actor.CALL_LIMIT_S
        while True:
            alive = await asyncio.to_thread(ray_tools.live_actor_names, self.namespace)
            if not (taken := sorted(set(names) & set(alive))):
                return
            if asyncio.get_running_loop().time() > deadline:
                raise StartError(taken[0], "an actor of that name is alive and does not end")
            await asyncio.to_thread(ray_tools.kill_actors, taken, self.namespace)
            await asyncio.sleep(_POLL_S)

    def _ended(self, actor: ActorCalls, task: asyncio.Future[None]) -> None:
        self._ending.discard(task)
        if task.cancelled() or task.exception() is not None:
            self._actors.setdefault(actor.name, actor)  # it may be alive: a later call tries again


async def _all_or_first_error(calls: Sequence[Awaitable[None]]) -> None:
    """Wait for all calls; raise the first error and cancel the other calls."""
    tasks = [asyncio.ensure_future(c) for c in calls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
