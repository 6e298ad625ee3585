"""The faults, by name, and their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.core.errors import ExpertMeshError
from tests.simulation.disk import files
from tests.simulation.kernel import Process
from tests.simulation.ray import HEAD

if TYPE_CHECKING:
    from tests.simulation.scenario import Fault
    from tests.simulation.world import World

PROCESS_FAULTS = (
    "kill_worker",
    "kill_worker",
    "kill_worker",
    "kill_two_workers",
    "kill_attention",
    "pause_worker",
    "pause_host",
    "kill_controller",
    "kill_controller",
    "pause_controller",
    "supersede_controller",
    "freeze_controller",
    "kill_gateway",
    "pause_gateway",
    "slow_disk",
    "break_disk",
    "slow_machine",
)
DISK_FAULTS = ("change_file", "shorten_file", "flaky_disk")
LINK_FAULTS = (
    "reset_link",
    "blackhole_link",
    "blackhole_link",
    "slow_link",
    "isolate_worker",
    "isolate_head",
)
ORDERS = ("drain_worker", "rebalance")
KINDS = (*PROCESS_FAULTS, *DISK_FAULTS, *LINK_FAULTS, *ORDERS)
"""Faults that scenarios draw from; those named twice come more often."""
_SHORT_S = 0.2
"""A pause of this time is no reason to end a worker."""


class Faults:
    """Carries out the faults of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._paused: list[Process] = []
        self.guilty: dict[str, str] = {}
        """Workers that a fault has touched, and how: the controller may end them."""
        self.unreadable: set[str] = set()
        """Hosts that could not read the checkpoint: their workers may be left out for good."""
        self.bad_hosts: set[str] = set()
        """Hosts that a fault has touched: all their workers, later ones included, may end."""

    def begin(self, fault: Fault) -> None:
        """A fault happens; one that lasts ends by itself."""
        self._world.kernel.log("fault: %s", fault)
        getattr(self, fault.kind)(fault)

    def heal(self) -> None:
        """Nothing is wrong any more."""
        self._world.net.heal_all()
        self._world.kernel.suspended.clear()
        for process in (*self._paused, *self._processes()):
            process.resume()
        self._world.kernel.disk.repair()
        self._world.kernel.slowness = self._world.scenario.slowness

    # ---- processes ----------------------------------------------------------------------------

    def kill_worker(self, fault: Fault) -> None:
        worker = self._worker(fault.where)
        if worker is not None:
            self._kill(worker)

    def kill_two_workers(self, fault: Fault) -> None:
        for worker in (self._worker(fault.where), self._worker(fault.other)):
            if worker is not None:
                self._kill(worker)

    def kill_attention(self, fault: Fault) -> None:
        """All attention workers: nobody holds a request any more."""
        for worker in list(self._world.ray.workers.values()):
            if worker.args.member.runs_attention:
                self._kill(worker.process)

    def pause_worker(self, fault: Fault) -> None:
        worker = self._worker(fault.where)
        if worker is not None:
            if fault.lasts_s > _SHORT_S:
                self.guilty[worker.name] = "paused"
            self._pause(worker, fault.lasts_s)

    def kill_controller(self, fault: Fault) -> None:
        controller = self._world.ray.controller
        if controller is not None and self._witnesses():
            controller.process.kill()

    def kill_gateway(self, fault: Fault) -> None:
        living = [g for g in self._world.gateways if not g.process.is_dead]
        if len(living) > 1:
            living[fault.where % len(living)].process.kill()

    def pause_controller(self, fault: Fault) -> None:
        controller = self._world.ray.controller
        if controller is not None:
            self._pause(controller.process, fault.lasts_s)

    def supersede_controller(self, fault: Fault) -> None:
        """Ray takes a living controller for dead."""
        if self._world.ray.controller is not None and self._witnesses():
            self._world.ray.supersede()

    def freeze_controller(self, fault: Fault) -> None:
        """Ray takes a controller for dead that stands still; a worker dies before it goes on."""
        controller = self._world.ray.controller
        if controller is not None and self._witnesses():
            self._pause(controller.process, fault.lasts_s + _SHORT_S)
            self._world.ray.supersede()
            self._world.kernel.after(_SHORT_S / 2, self.kill_worker, fault)

    def pause_host(self, fault: Fault) -> None:
        """All processes of a host stand still: a suspended machine, or a moved one."""
        kernel, host = self._world.kernel, self._hosts()[fault.where % len(self._hosts())]
        kernel.suspended[host] = kernel.now + fault.lasts_s
        for process in self._processes():
            if process.host == host:
                self._pause(process, fault.lasts_s)
        if host != HEAD and fault.lasts_s > _SHORT_S:  # else all workers of the head stand still
            self._blame(host)

    def pause_gateway(self, fault: Fault) -> None:
        gateways = self._world.gateways
        self._pause(gateways[fault.where % len(gateways)].process, fault.lasts_s)

    # ---- machines -----------------------------------------------------------------------------

    def slow_disk(self, fault: Fault) -> None:
        disk = self._world.kernel.disk
        disk.read_s *= 100
        self._world.kernel.after(fault.lasts_s, disk.recover)

    def break_disk(self, fault: Fault) -> None:
        """Nothing can be read on a host for a while."""
        worker, disk = self._worker(fault.where), self._world.kernel.disk
        if worker is not None:
            self._blame(worker.host)
            self.unreadable.add(worker.host)
            disk.broken_hosts.add(worker.host)
            self._world.kernel.after(fault.lasts_s, disk.broken_hosts.discard, worker.host)

    def flaky_disk(self, fault: Fault) -> None:
        """One of ten reads fails on a host for a while."""
        worker, disk = self._worker(fault.where), self._world.kernel.disk
        if worker is not None:
            self._blame(worker.host)
            self.unreadable.add(worker.host)
            disk.flaky_hosts.add(worker.host)
            self._world.kernel.after(fault.lasts_s, disk.flaky_hosts.discard, worker.host)

    def change_file(self, fault: Fault) -> None:
        """A file of the checkpoint is overwritten in place, and restored later; at every second
        number, once somebody reads it."""
        disk = self._world.kernel.disk
        self._damage_file(fault, disk.change_when_read if fault.where % 2 else disk.change)

    def shorten_file(self, fault: Fault) -> None:
        """A file of the checkpoint is cut off, and restored later."""
        self._damage_file(fault, self._world.kernel.disk.shorten)

    def _damage_file(self, fault: Fault, damage: Callable[[str, str], None]) -> None:
        worker = self._worker(fault.where)
        if worker is None:
            return
        host, name = worker.host, files()[fault.other % len(files())]
        self._world.kernel.log("%s on %s", name, host)
        self._blame(host)
        self.unreadable.add(host)
        damage(host, name)
        self._world.kernel.after(fault.lasts_s, self._world.kernel.disk.restore, host, name)

    def slow_machine(self, fault: Fault) -> None:
        """Everything takes ten times as long to compute."""
        kernel = self._world.kernel
        usual = self._world.scenario.slowness
        kernel.slowness = 10 * usual

        def end() -> None:
            kernel.slowness = usual

        kernel.after(fault.lasts_s, end)

    # ---- links --------------------------------------------------------------------------------

    def reset_link(self, fault: Fault) -> None:
        first, second = self._two_hosts(fault)
        self._blame(first, second)
        self._world.net.reset(first, second)

    def blackhole_link(self, fault: Fault) -> None:
        """One direction; the other one as well at every second number."""
        net, (first, second) = self._world.net, self._two_hosts(fault)
        self._blame(first, second)
        pairs = [(first, second)] if fault.where % 2 else [(first, second), (second, first)]
        for pair in pairs:
            net.block(*pair)
            self._world.kernel.after(fault.lasts_s, net.heal, *pair)

    def slow_link(self, fault: Fault) -> None:
        net, (first, second) = self._world.net, self._two_hosts(fault)
        net.slow(first, second, min(fault.lasts_s, 0.3) / 2)
        self._world.kernel.after(fault.lasts_s, net.heal, first, second)

    def isolate_worker(self, fault: Fault) -> None:
        """A host neither sends nor receives."""
        worker = self._worker(fault.where)
        if worker is not None:
            self._blame(worker.host)
            self._isolate(worker.host, fault.lasts_s)

    def isolate_head(self, fault: Fault) -> None:
        """A blip at the host of the controller and of Ray: most workers are not at fault."""
        self._isolate(HEAD, fault.lasts_s)

    # ---- orders of operators ------------------------------------------------------------------

    def drain_worker(self, fault: Fault) -> None:
        worker = self._worker(fault.where)
        if worker is not None:
            self.guilty[worker.name] = "drained"
            self._order("drain", {"worker": worker.name, "limit_s": max(fault.lasts_s, 1.0)})

    def rebalance(self, fault: Fault) -> None:
        self._order("rebalance", {})

    # ---- small things -------------------------------------------------------------------------

    def _worker(self, number: int) -> Process | None:
        """A living worker."""
        workers = list(self._world.ray.workers.values())
        return workers[number % len(workers)].process if workers else None

    def _kill(self, process: Process) -> None:
        """Not the last one that knows the cluster: without any, it would be lost for good."""
        controller = self._world.ray.controller
        leads = controller is not None and controller.term > 0 and not controller.process.is_paused
        if leads or any(witness is not process for witness in self._witnesses()):
            self.guilty[process.name] = "killed"
            process.kill()

    def _witnesses(self) -> list[Process]:
        """Living workers that know a generation."""
        workers = self._world.ray.workers.values()
        return [w.process for w in workers if w.runtime.membership.generation.number]

    def _processes(self) -> list[Process]:
        """All of them, controllers that Ray has given up included."""
        world = self._world
        found = [w.process for w in world.ray.workers.values()]
        found += [g.process for g in world.gateways]
        return found + [c.process for c in world.ray.controllers]

    def _pause(self, process: Process, lasts_s: float) -> None:
        process.pause()
        self._paused.append(process)
        self._world.kernel.after(lasts_s, process.resume)

    def _isolate(self, host: str, lasts_s: float) -> None:
        net = self._world.net
        for other in self._hosts():
            if other != host:
                for pair in ((host, other), (other, host)):
                    net.block(*pair)
                    self._world.kernel.after(lasts_s, net.heal, *pair)

    def _two_hosts(self, fault: Fault) -> tuple[str, str]:
        hosts = self._hosts()
        first = hosts[fault.where % len(hosts)]
        others = [host for host in hosts if host != first]
        return first, others[fault.other % len(others)]

    def _blame(self, *hosts: str) -> None:
        self.bad_hosts |= set(hosts)

    def _order(self, method: str, order: dict[str, Any]) -> None:
        """An operator's call of the controller."""
        controller = self._world.ray.controller
        if controller is None or controller.process.is_dead:
            return
        loop = controller.process.loop

        async def call() -> None:
            try:
                answer = await getattr(controller.actor, method)(order)
            except ExpertMeshError as err:  # refused by name
                answer = err
            self._world.kernel.log("%s: %s", method, answer)

        controller.process.run(loop.call_soon, lambda: loop.create_task(call()))

    def _hosts(self) -> list[str]:
        workers = self._world.ray.workers.values()
        gateways = self._world.gateways
        hosts = [HEAD, *(w.process.host for w in workers), *(g.process.host for g in gateways)]
        return list(dict.fromkeys(hosts))
