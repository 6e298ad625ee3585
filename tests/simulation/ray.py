"""A simulated Ray: actors by name, calls with delay and loss, one controller that it restarts.

``SimRay`` is the cluster of Ray, ``SimGroup`` what a controller has in place of ``WorkerGroup``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

from cluster.actors.controller_actor import ControllerActor
from cluster.config.cluster import WorkersSection
from cluster.config.resources import NodeResources
from cluster.core.errors import ExpertMeshError, StartError, SupersededError
from cluster.core.topology import Member, Role, holds_experts
from cluster.sizing.start_plan import FoundWorker, StartPlan
from tests.simulation.kernel import Fiber, Kernel, Process
from tests.simulation.network import Network, Pipe
from tests.simulation.worker import SimWorker

HEAD = "head"
"""The host of Ray's head, of the controller and of the first gateway."""


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


_START_S = 0.3
"""Mean time in which Ray starts a process."""
_PING_S = 0.5
_LOST_S = 0.2
"""Time until Ray notices that a call is lost."""
_AGAIN_S = 0.05
_CALL_LIMIT_S = 5.0
_STOP_LIMIT_S = 2.0
WORKER_ROLES: tuple[Role, ...] = ("attention", "expert")


_PART_LOST = 0.3
"""Part of the calls that are lost while Ray loses calls."""


class ActorLostError(Exception):
    """Ray's error for a call of an actor that is gone."""


class UnavailableError(Exception):
    """Ray's error for a call that was lost, or its answer; the actor may live."""


@dataclass(slots=True)
class Ends:
    """Workers that controllers have asked to be ended: (term, worker, time)."""

    asked: list[tuple[int, str, float]] = field(default_factory=list)


class SimRay:
    """All actors. Its head never dies."""

    def __init__(self, kernel: Kernel, net: Network, hosts: Hosts) -> None:
        self.kernel, self.net, self._hosts = kernel, net, hosts
        self.workers: dict[str, SimWorker] = {}
        self.ever: dict[str, SimWorker] = {}
        """Every worker that was started, by name."""
        self.controller: SimController | None = None
        """The actor that Ray's name leads to."""
        self.controllers: list[SimController] = []
        """All that were started; a superseded one may live on."""
        self.newest_term = 0
        """Highest term that a controller has claimed."""
        self.ends = Ends()
        self.num_losses = 0
        """Faults under way in which calls are lost."""
        self.restart_s = 0.5
        """Mean time in which Ray notices a dead controller and starts another."""
        self._pids = 100

    def new_pid(self) -> int:
        self._pids += 1
        return self._pids

    def host_of(self, role: Role, rank: int) -> str:
        """A replacement starts where the lost worker was."""
        are_two = self._hosts in (Hosts.TWO, Hosts.PAIR)
        number = rank % 2 if are_two else rank
        if self._hosts is Hosts.ONE or (self._hosts.has_workers_at_head and number == 0):
            return HEAD
        return f"host-{number}" if are_two else f"{role}-{rank}"

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
        process = Process(self.kernel, name, HEAD, self.new_pid())
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

    async def call(self, caller: Process, worker: SimWorker, method: str, *args: Any) -> Any:
        """Call a worker actor. Raises ``ActorLostError``, ``UnavailableError``."""
        is_lost = self.num_losses > 0 and self.kernel.rng.random() < _PART_LOST
        if is_lost and self.kernel.rng.random() < 0.5:
            await asyncio.sleep(_LOST_S)
            raise UnavailableError(worker.name)
        answer = asyncio.get_running_loop().create_future()
        loop = caller.loop
        there = Pipe(self.net, caller.host, worker.process.host)
        back = Pipe(self.net, worker.process.host, caller.host)

        def settle(result: Any, error: Exception | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)

        def reply(result: Any, error: Exception | None) -> None:
            if is_lost:
                result, error = None, UnavailableError(worker.name)
            back.send(caller.run, loop.call_soon, settle, result, error)

        def run() -> None:
            try:
                reply(worker.call(method, *args), None)
            except ExpertMeshError as err:
                reply(None, err)

        def arrive() -> None:
            if worker.is_dead:
                reply(None, ActorLostError(worker.name))
            else:
                worker.process.on_death.append(lambda: reply(None, ActorLostError(worker.name)))
                Fiber(worker.process, run, method).start()

        there.send(arrive)
        return await answer


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
        self._known: dict[str, SimWorker] = {}
        self._term, self._identity = 0, ""

    def resources(self) -> tuple[NodeResources, ...]:
        hosts = dict.fromkeys(
            (HEAD, *(self._ray.host_of(r, i) for r in WORKER_ROLES for i in range(8)))
        )
        return tuple(NodeResources(node_id=h, address=h, cpus=8.0) for h in hosts)

    def leaving(self) -> list[str]:
        return []

    def free_cpus(self) -> float:
        return 64.0

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
        return tuple(
            Member(
                name=f"{role}-{rank}",
                role=role,
                rank=rank,
                device=rank if holds_experts(role) else -1,
                node=self._ray.host_of(role, rank),
            )
            for role, number in workers.pools.items()
            for rank in range(number)
        )

    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        ray = self._ray
        for member in members:
            await asyncio.sleep(self._kernel.rng.uniform(0.5, 1.5) * _START_S / len(members))
            await self.check_term()
            ray.check_order(self._term, f"starts {member.name}")
            if member.name in ray.workers:
                raise StartError(member.name, "an actor of that name lives")
            worker = SimWorker(
                self._kernel,
                ray.host_of(member.role, member.rank),
                ray.new_pid(),
                member,
                plan.arguments(member, address),
            )
            ray.workers[member.name] = ray.ever[member.name] = self._known[member.name] = worker
            worker.process.on_death.append(partial(self._forget, member.name))
            worker.call("start")

    def _forget(self, name: str) -> None:
        self._ray.workers.pop(name, None)

    async def watch_creation(self, names: Sequence[str], on_process: Callable[[str], None]) -> None:
        return None

    async def watch(
        self, is_connected: Callable[[str], bool], on_died: Callable[[str, str], None]
    ) -> None:
        waiting = list(self._known.values())
        while waiting:
            await asyncio.sleep(_PING_S)
            waiting = [w for w in waiting if not is_connected(w.name)]
            for worker in list(waiting):
                if worker.is_dead:
                    waiting.remove(worker)
                    on_died(worker.name, "its process died")

    async def find(self, limit_s: float) -> tuple[FoundWorker, ...]:
        self._known = dict(self._ray.workers)
        asked = await asyncio.gather(*(self._find(w, limit_s) for w in self._known.values()))
        found = tuple(f for f in asked if f is not None)
        if self._known and not found:
            raise TimeoutError("no worker answers")
        return found

    async def _find(self, worker: SimWorker, limit_s: float) -> FoundWorker | None:
        try:
            async with asyncio.timeout(limit_s):
                await self._introduce(worker)
        except TimeoutError:
            return None
        except ActorLostError:
            self._known.pop(worker.name, None)
            return None
        return FoundWorker(
            name=worker.name,
            config=worker.args.config,
            num_slots=worker.args.num_slots,
            has_called=worker.runtime.has_called,
        )

    async def _introduce(self, worker: SimWorker) -> None:
        while True:
            with suppress(UnavailableError):
                await self._ray.call(self._process, worker, "introduce")
                return
            await asyncio.sleep(_AGAIN_S)

    async def claim(self, identity: str) -> int:
        await asyncio.sleep(self._kernel.rng.uniform(0.0005, 0.003))
        self._term, self._identity = self._ray.claim(), identity
        return self._term

    def names(self) -> list[str]:
        return list(self._known)

    async def redirect(self, name: str, control_address: str) -> None:
        worker, controller = self._known[name], (self._term, self._identity)
        call = self._ray.call(self._process, worker, "redirect", control_address, *controller)
        try:
            await asyncio.wait_for(call, _CALL_LIMIT_S)
        except ActorLostError as err:
            raise ProcessLookupError(name) from err

    async def end(self, names: Sequence[str]) -> None:
        workers = [self._known.pop(n) for n in names if n in self._known]
        await asyncio.gather(*(self._end(w) for w in workers))

    async def end_all(self) -> None:
        await self.end(self.names())

    async def _end(self, worker: SimWorker) -> None:
        try:
            await self._end_process(worker)
        except BaseException:
            self._known[worker.name] = worker
            raise

    async def _end_process(self, worker: SimWorker) -> None:
        """By its own ``stop``, then by a signal; as ``WorkerGroup`` does it."""
        kernel, ray = self._kernel, self._ray
        await self.check_term()
        stop = ray.call(self._process, worker, "stop", self._term, self._identity)
        with suppress(TimeoutError, ActorLostError, UnavailableError):
            await asyncio.wait_for(stop, _STOP_LIMIT_S)
        await self.check_term()
        ray.check_order(self._term, f"ends {worker.name}")
        if not worker.is_dead:
            ray.ends.asked.append((self._term, worker.name, kernel.now))
        worker.process.kill(f"ended by {self._process.name}")

    async def check_term(self) -> None:
        await asyncio.sleep(self._kernel.rng.uniform(0.0005, 0.003))
        if self._ray.newest_term > self._term:
            raise SupersededError(f"term {self._ray.newest_term} is claimed")
