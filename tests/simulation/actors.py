"""Worker actors of the simulated Ray: where they start, calls with delay and loss, and their end.

An actor that Ray's head has killed, or whose node is dead to it, has a process that lives on while
its host is cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from cluster.core.errors import ExpertMeshError
from cluster.core.topology import Member, Role
from cluster.policy.places import place_of
from cluster.sizing.start_plan import WorkerArguments
from tests.simulation.kernel import Fiber, Kernel, Process
from tests.simulation.network import Network, Pipe
from tests.simulation.nodes import Node, Nodes
from tests.simulation.worker import SimWorker

_LOST_S = 0.2
"""Time until Ray notices that a call is lost."""
_PART_LOST = 0.3
"""Part of the calls that are lost while Ray loses calls."""


class ActorLostError(Exception):
    """Ray's error for a call of an actor that is gone."""


class UnavailableError(Exception):
    """Ray's error for a call that was lost, or its answer; the actor may live."""


class SimActor:
    """What Ray's head knows of a worker."""

    def __init__(self, member: Member, arguments: WorkerArguments) -> None:
        self.name = member.name
        self.member, self.arguments = member, arguments
        self.node: Node | None = None
        """Where it starts, or has started; None while there is no room."""
        self.worker: SimWorker | None = None
        """Its process, once there is one."""
        self.is_up = self.is_dead = False
        self._waiting: list[Callable[[], None]] = []
        """Calls that wait for its process."""
        self.on_dead: list[Callable[[], None]] = []

    def when_up(self, call: Callable[[], None]) -> None:
        """Do this as soon as its process runs."""
        if self.is_up:
            call()
        else:
            self._waiting.append(call)

    def come_up(self) -> None:
        """Its process runs."""
        self.is_up = True
        for call in self._waiting:
            call()

    def die(self) -> None:
        """It is dead, to Ray's head."""
        if not self.is_dead:
            self.is_dead = True
            for call in self.on_dead:
                call()


class Actors:
    """All worker actors."""

    def __init__(
        self,
        kernel: Kernel,
        net: Network,
        nodes: Nodes,
        *,
        may_move: bool,
        rack_of: Callable[[str], str],
    ) -> None:
        """``may_move``: the room of a dead node is found again on others; else it is waited for.
        ``rack_of``: the failure domain of a host.
        """
        self._kernel, self._net, self._nodes = kernel, net, nodes
        self._may_move, self._rack_of = may_move, rack_of
        self._rooms: dict[tuple[Role, int], str] = {}
        """The host with the room that is reserved for a role and rank."""
        self.added: set[str] = set()
        """Places that scaling has added, and whose room nobody has given back."""
        self.alive: dict[str, SimActor] = {}
        """By name, those that live to Ray's head."""
        self.workers: dict[str, SimWorker] = {}
        """By name, those whose processes live, whatever Ray's head believes."""
        self.ever: dict[str, SimWorker] = {}
        """By name, all whose processes were started."""
        self.num_losses = 0
        """Faults under way in which calls are lost."""
        self._pids = 100
        nodes.on_dead.append(self._bury)
        nodes.on_end.append(self._end_all)
        nodes.on_new.append(self._place_all)

    def new_pid(self) -> int:
        self._pids += 1
        return self._pids

    def reserve(self, member: Member) -> None:
        """Room for a worker, and for those in its place."""
        self._rooms[member.role, member.rank] = member.node
        self._nodes.add(member.node)

    def find_room(self, member: Member, host: str) -> None:
        """Room for a worker of a place that was not there at the start; no effect for others."""
        if (member.role, member.rank) not in self._rooms:
            self._rooms[member.role, member.rank] = host
            self._nodes.add(host)
            self.added.add(place_of(member.name))

    def give_back(self, places: Collection[str]) -> None:
        """Room of places that scaling has added is free again; who waits for it never starts."""
        freed = self.added.intersection(places)
        for actor in list(self.alive.values()):
            if actor.node is None and place_of(actor.name) in freed:
                actor.die()
        for key in [k for k in self._rooms if f"{k[0]}-{k[1]}" in freed]:
            del self._rooms[key]
        self.added.difference_update(places)

    def create(self, member: Member, arguments: WorkerArguments) -> SimActor:
        """A new actor, whose process starts where there is room."""
        actor = self.alive[member.name] = SimActor(member, arguments)
        actor.on_dead.append(partial(self._forget, actor))
        self._place(actor)
        return actor

    async def call(
        self, caller: Process, actor: SimActor, method: str, *args: Any, is_safe: bool = False
    ) -> Any:
        """Call an actor; ``is_safe``: never lost. Raises ``ActorLostError``, ``UnavailableError``,
        and what the worker raises.
        """
        is_lost = not is_safe and self.num_losses > 0 and self._kernel.rng.random() < _PART_LOST
        if is_lost and self._kernel.rng.random() < 0.5:
            await asyncio.sleep(_LOST_S)
            raise UnavailableError(actor.name)
        if actor.is_dead:
            raise ActorLostError(actor.name)
        answer = asyncio.get_running_loop().create_future()
        loop = caller.loop

        def settle(result: Any, error: Exception | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)

        def lose() -> None:
            caller.run(loop.call_soon, settle, None, ActorLostError(actor.name))

        def send() -> None:
            worker = actor.worker
            assert worker is not None, "it is up"
            back = Pipe(self._net, worker.process.host, caller.host)

            def reply(result: Any, error: Exception | None) -> None:
                if is_lost:
                    result, error = None, UnavailableError(actor.name)
                back.send(caller.run, loop.call_soon, settle, result, error)

            def run() -> None:
                try:
                    reply(worker.call(method, *args), None)
                except ExpertMeshError as err:
                    reply(None, err)

            def arrive() -> None:
                if not worker.is_dead:
                    Fiber(worker.process, run, method).start()

            Pipe(self._net, caller.host, worker.process.host).send(arrive)

        actor.on_dead.append(lose)
        actor.when_up(send)
        return await answer

    def kill_process(self, actor: SimActor, killer: Process) -> None:
        """A task of Ray that kills the actor's process; it is cancelled with its owner."""
        if actor.worker is not None and actor.node is not None and actor.node.is_alive:
            self._nodes.reach(actor.node.host, self._kill, actor.worker, killer, True)

    def kill(self, actor: SimActor, killer: Process) -> None:
        """Dead to Ray's head at once, and in truth when the host hears so."""
        actor.die()
        if actor.worker is not None:
            host = actor.worker.process.host
            self._nodes.reach(host, self._kill, actor.worker, killer, False)

    def on_node(self, node: Node) -> Iterable[SimWorker]:
        """Workers whose processes live on a node."""
        return [w for w in self.workers.values() if w.process.host == node.host]

    def _kill(self, worker: SimWorker, killer: Process, is_owned: bool) -> None:
        if not (is_owned and killer.is_dead):
            worker.process.kill(f"ended by {killer.name}")

    # ---- where they run ------------------------------------------------------------------------

    def _place(self, actor: SimActor) -> None:
        """Have a node start the process, if any has room."""
        actor.node = node = self._room_for(actor.member)
        if node is not None:
            self._nodes.reach(node.host, self._begin, actor, node)

    def _room_for(self, member: Member) -> Node | None:
        place, of_host = (member.role, member.rank), self._nodes.of_host
        home = of_host[self._rooms[place]]
        if home.is_open:
            return home
        others = [of_host[host] for host in dict.fromkeys(self._rooms.values())]
        others = [node for node in others if node.is_open]
        if home.is_alive or not self._may_move or not others:
            return None
        found = self._kernel.rng.choice(others)
        self._rooms[place] = found.host
        return found

    def _begin(self, actor: SimActor, node: Node) -> None:
        """A node starts the process."""
        if actor.is_dead or actor.worker is not None or actor.node is not node or node.has_ended:
            return
        config, member, address, others = actor.arguments
        if not actor.member.node:  # see ``workers.process.worker.actor``
            member = {**member, "domain": self._rack_of(node.host)}
        arguments = config, member, address, others
        worker = SimWorker(self._kernel, node.host, self.new_pid(), actor.member, arguments)
        actor.worker = self.workers[actor.name] = self.ever[actor.name] = worker
        worker.process.on_death.append(partial(self._ended, actor, worker))
        self._nodes.tell(node.host, actor.come_up)

    def _ended(self, actor: SimActor, worker: SimWorker) -> None:
        """A process has ended; the raylet reports it."""
        del self.workers[actor.name]
        self._nodes.tell(worker.process.host, actor.die)

    def _forget(self, actor: SimActor) -> None:
        self.alive.pop(actor.name, None)

    def _bury(self, node: Node) -> None:
        """A node is dead to Ray's head, with its actors; those to be started start elsewhere."""
        for actor in [a for a in self.alive.values() if a.node is node]:
            if actor.worker is None:
                self._place(actor)
            else:
                actor.die()

    def _end_all(self, node: Node) -> None:
        """A raylet ends, and all its workers."""
        for worker in self.on_node(node):
            worker.process.kill("Ray's node ends")

    def _place_all(self) -> None:
        """There may be room again."""
        for actor in list(self.alive.values()):
            if actor.node is None:
                self._place(actor)
