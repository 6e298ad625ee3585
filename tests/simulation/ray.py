"""A simulated Ray: nodes, worker actors by name, one controller that it restarts.

``SimRay`` is the cluster of Ray, ``SimGroup`` what a controller has in place of ``WorkerGroup``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from cluster.actors.controller_actor import ControllerActor
from cluster.config.resources import NodeResources
from cluster.config.workers import WorkersSection
from cluster.core.errors import StartError, SupersededError
from cluster.core.node_labels import NodeLabels
from cluster.core.topology import Member, Role, holds_experts
from cluster.sizing.start_plan import ExistingWorker, StartPlan
from tests.simulation.actors import ActorLostError, Actors, SimActor, UnavailableError
from tests.simulation.kernel import Kernel, Process
from tests.simulation.network import Network
from tests.simulation.nodes import HEAD, Node, Nodes

if TYPE_CHECKING:
    from tests.simulation.scenario import Scenario


class Hosts(Enum):
    """Where workers run."""

    MANY = "each on a host of its own"
    TWO = "two hosts"
    PAIR = "Ray's head and another host"
    ONE = "all with Ray's head"
    MIXED = "the first of each role with Ray's head, the others each on a host of its own"

    @property
    def has_workers_at_head(self) -> bool:
        """And some elsewhere."""
        return self in (Hosts.PAIR, Hosts.MIXED)

    @property
    def are_followed(self) -> bool:
        """The numbers of workers follow the hosts."""
        return self is Hosts.MANY


_START_S = 0.3
"""Mean time in which Ray starts a process."""
_PING_S = 0.5
_AGAIN_S = 0.05
_CALL_LIMIT_S = 5.0
_STOP_LIMIT_S = 2.0
_SPARE_CPUS = 2
"""CPUs of a host beyond those of all workers at the start."""


@dataclass(slots=True)
class Ends:
    """Workers that controllers have asked to be ended: (term, worker, time)."""

    asked: list[tuple[int, str, float]] = field(default_factory=list)


class SimRay:
    """All actors. Its head never dies."""

    def __init__(self, kernel: Kernel, net: Network, scenario: Scenario) -> None:
        self.kernel, self.net, self._hosts = kernel, net, scenario.hosts
        self._num_racks = scenario.num_racks
        self.nodes = Nodes(kernel, net, scenario.node_limit_s)
        self.actors = Actors(
            kernel, net, self.nodes, may_move=scenario.may_move, rack_of=self.rack_of
        )
        self.nodes.add(HEAD)
        counts: tuple[tuple[Role, int], ...] = (
            ("attention", scenario.num_attention),
            ("expert", scenario.num_experts),
        )
        self._cpus = max(8.0, sum(count for _, count in counts) + _SPARE_CPUS)
        for role, count in counts:
            for rank in range(count):
                self.nodes.add(self.host_of(role, rank))
        self.controller: SimController | None = None
        """The actor that Ray's name leads to."""
        self.controllers: list[SimController] = []
        """All that were started; a superseded one may live on."""
        self.newest_term = 0
        """Highest term that a controller has claimed."""
        self.ends = Ends()
        self.restart_s = 0.5
        """Mean time in which Ray notices a dead controller and starts another."""

    def host_of(self, role: Role, rank: int) -> str:
        """Where there is room for a worker at first."""
        are_two = self._hosts in (Hosts.TWO, Hosts.PAIR)
        number = rank % 2 if are_two else rank
        if self._hosts is Hosts.ONE or (self._hosts.has_workers_at_head and number == 0):
            return HEAD
        return f"host-{number}" if are_two else f"{role}-{rank}"

    def rack_of(self, host: str) -> str:
        """The failure domain of a host, by its label; empty without one."""
        number = host.rpartition("-")[2]
        if not self._num_racks:
            return ""
        return f"rack-{int(number) % self._num_racks if number.isdigit() else 0}"

    def resources_of(self, node: Node) -> NodeResources:
        """What a node has: where each worker has a host of its own, room for one, by its label."""
        role = node.host.partition("-")[0] if self._hosts.are_followed and node.host != HEAD else ""
        return NodeResources(
            node_id=node.node_id,
            address=node.host,
            cpus=1.0 if role else self._cpus,
            labels=NodeLabels(role=role, domain=self.rack_of(node.host)),
        )

    def claim(self) -> int:
        """A controller claims a term, above all others."""
        self.newest_term += 1
        return self.newest_term

    def check_order(self, term: int, what: str) -> None:
        """Only the highest term may do this."""
        if term < self.newest_term:
            self.kernel.failures.append(
                f"a controller of term {term} {what}, term {self.newest_term} is claimed"
            )

    def start_controller(self, was_restarted: bool) -> SimController:
        """Start the controller actor, or another one in its place."""
        name = f"controller.{len(self.controllers)}"
        process = Process(self.kernel, name, HEAD, self.actors.new_pid())
        controller = SimController(self, process, was_restarted)
        self.controller = controller
        self.controllers.append(controller)
        process.on_death.append(lambda: self._controller_died(controller))
        return controller

    def supersede(self) -> None:
        """Ray believes that the controller is dead, which it is not."""
        self.kernel.log("Ray gives up the controller")
        self._controller_died(self.controller)

    def _controller_died(self, controller: SimController | None) -> None:
        if controller is self.controller and controller is not None:
            self.controller = None
            self.kernel.after(
                self.kernel.rng.uniform(0.5, 2.0) * self.restart_s, self._restart_controller
            )

    def _restart_controller(self) -> None:
        self.start_controller(was_restarted=True)


class SimController:
    """The controller actor in its process."""

    def __init__(self, ray: SimRay, process: Process, was_restarted: bool) -> None:
        self.ray, self.process = ray, process
        kernel = ray.kernel
        before, kernel.process = kernel.process, process
        self.actor = ControllerActor(SimGroup(ray, process, self, was_restarted))  # type: ignore[arg-type]
        kernel.process = before

    @property
    def term(self) -> int:
        controller = self.actor.runner.controller
        return controller.cluster.term if controller is not None else 0


class SimGroup:
    """``WorkerGroup`` on ``SimRay``."""

    def __init__(
        self, ray: SimRay, process: Process, owner: SimController, was_restarted: bool
    ) -> None:
        self._ray, self._process, self._owner = ray, process, owner
        self._kernel = ray.kernel
        self._was_restarted = was_restarted
        self._known: dict[str, SimActor] = {}
        self._term, self._identity = 0, ""

    def resources(self) -> tuple[NodeResources, ...]:
        return tuple(self._ray.resources_of(node) for node in self._ray.nodes.alive())

    def draining_nodes(self) -> frozenset[str]:
        return frozenset(node.node_id for node in self._ray.nodes.alive() if node.drains)

    def node_ids_by_worker(self) -> dict[str, str]:
        return {a.name: a.node.node_id for a in self._known.values() if a.node is not None}

    def address(self) -> str:
        return self._process.host

    def was_restarted(self) -> bool:
        return self._was_restarted

    def call_back(self, method: str) -> None:
        owner = self._owner

        def call() -> None:
            self._process.loop.create_task(getattr(owner.actor, method)())

        self._process.loop.call_soon(call)

    def end_this_process(self) -> None:
        self._process.kill("its own end")

    def reserve(self, workers: WorkersSection, limit_s: float) -> tuple[Member, ...]:
        found = tuple(
            Member(
                name=f"{role}-{rank}",
                role=role,
                rank=rank,
                device=rank if holds_experts(role) else -1,
                node=self._ray.host_of(role, rank),
                domain=self._ray.rack_of(self._ray.host_of(role, rank)),
            )
            for role, number in workers.pools.items()
            for rank in range(number)
        )
        for member in found:
            self._ray.actors.reserve(member)
        return found

    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        ray, created = self._ray, list[SimActor]()
        for member in members:
            await asyncio.sleep(self._kernel.rng.uniform(0.5, 1.5) * _START_S / len(members))
            await self.check_term()
            ray.check_order(self._term, f"starts {member.name}")
            if member.name in ray.actors.alive:
                raise StartError(member.name, "an actor of that name lives")
            ray.actors.find_room(member, ray.host_of(member.role, member.rank))
            actor = ray.actors.create(member, plan.arguments(member, address))
            self._known[member.name] = actor
            created.append(actor)
        await asyncio.gather(*(self._bring_up(actor) for actor in created))

    async def release(self, places: Sequence[str]) -> None:
        await self.check_term()
        self._ray.check_order(self._term, f"gives back the room of {places}")
        self._ray.actors.give_back(places)

    def added_places(self) -> set[str]:
        return set(self._ray.actors.added)

    async def _bring_up(self, actor: SimActor) -> None:
        try:
            await self._ray.actors.call(self._process, actor, "start", is_safe=True)
        except ActorLostError as err:
            raise StartError(actor.name, "its process died") from err

    async def watch_creation(self, names: Sequence[str], on_process: Callable[[str], None]) -> None:
        waiting = list(names)
        while waiting:
            await asyncio.sleep(_PING_S)
            for name in [n for n in waiting if n in self._known and self._known[n].is_up]:
                waiting.remove(name)
                on_process(name)

    async def watch(
        self, is_connected: Callable[[str], bool], on_died: Callable[[str, str], None]
    ) -> None:
        waiting = list(self._known.values())
        while waiting:
            await asyncio.sleep(_PING_S)
            waiting = [a for a in waiting if not is_connected(a.name)]
            for actor in list(waiting):
                if actor.is_dead:
                    waiting.remove(actor)
                    on_died(actor.name, "its process died")

    async def find(self, limit_s: float) -> tuple[ExistingWorker, ...]:
        self._known = dict(self._ray.actors.alive)
        asked = await asyncio.gather(*(self._find(a, limit_s) for a in self._known.values()))
        found = tuple(f for f in asked if f is not None)
        if self._known and not found:
            raise TimeoutError("no worker answers")
        return found

    async def _find(self, actor: SimActor, limit_s: float) -> ExistingWorker | None:
        try:
            async with asyncio.timeout(limit_s):
                await self._introduce(actor)
        except TimeoutError:
            return None
        except ActorLostError:
            self._known.pop(actor.name, None)
            return None
        worker = actor.worker
        assert worker is not None, "it has answered"
        return ExistingWorker(
            name=actor.name,
            config=worker.args.config,
            num_slots=worker.args.num_slots,
            has_connected=worker.worker.control.has_connected,
        )

    async def _introduce(self, actor: SimActor) -> None:
        while True:
            with suppress(UnavailableError):
                await self._ray.actors.call(self._process, actor, "describe")
                return
            await asyncio.sleep(_AGAIN_S)

    async def claim(self, identity: str) -> int:
        await asyncio.sleep(self._kernel.rng.uniform(0.0005, 0.003))
        self._term, self._identity = self._ray.claim(), identity
        return self._term

    def names(self) -> list[str]:
        return list(self._known)

    async def redirect(self, name: str, control_address: str) -> None:
        actor, controller = self._known[name], (self._term, self._identity)
        call = self._ray.actors.call(self._process, actor, "redirect", control_address, *controller)
        try:
            await asyncio.wait_for(call, _CALL_LIMIT_S)
        except ActorLostError as err:
            raise ProcessLookupError(name) from err

    async def end(self, names: Sequence[str]) -> None:
        actors = [self._known.pop(n) for n in names if n in self._known]
        await asyncio.gather(*(self._end(a) for a in actors))

    async def end_all(self) -> None:
        await self.end(self.names())

    async def _end(self, actor: SimActor) -> None:
        try:
            await self._end_process(actor)
        except BaseException:
            self._known[actor.name] = actor
            raise

    async def _end_process(self, actor: SimActor) -> None:
        """By its own ``stop``, by a signal, by Ray; as ``WorkerGroup`` does it."""
        ray, stopped = self._ray, False
        await self.check_term()
        stop = ray.actors.call(self._process, actor, "stop", self._term, self._identity)
        with suppress(TimeoutError, ActorLostError, UnavailableError):
            await asyncio.wait_for(stop, _STOP_LIMIT_S)
            stopped = True
        await self.check_term()
        ray.check_order(self._term, f"ends {actor.name}")
        if actor.worker is not None and not actor.worker.is_dead:
            ray.ends.asked.append((self._term, actor.name, self._kernel.now))
        if not stopped:
            await self._kill_by_pid(actor)
        ray.actors.kill(actor, self._process)

    async def _kill_by_pid(self, actor: SimActor) -> None:
        """A task on its node; it may come through after its time."""
        self._ray.actors.kill_process(actor, self._process)
        deadline = self._kernel.now + _CALL_LIMIT_S
        while self._is_on_its_way(actor) and self._kernel.now < deadline:
            await asyncio.sleep(_AGAIN_S)

    def _is_on_its_way(self, actor: SimActor) -> bool:
        has_node = actor.node is not None and actor.node.is_alive
        return actor.worker is not None and has_node and not actor.is_dead

    async def check_term(self) -> None:
        await asyncio.sleep(self._kernel.rng.uniform(0.0005, 0.003))
        if self._ray.newest_term > self._term:
            raise SupersededError(f"term {self._ray.newest_term} is claimed")
