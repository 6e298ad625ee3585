"""The faults, by name, and their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.kernel import Process
from tests.simulation.ray import HEAD

if TYPE_CHECKING:
    from tests.simulation.scenario import Fault
    from tests.simulation.world import World

KINDS = (
    "kill_worker",
    "kill_worker",
    "kill_two_workers",
    "pause_worker",
    "kill_controller",
    "kill_gateway",
)
"""Faults that scenarios draw from; those named twice come more often."""


class Faults:
    """Carries out the faults of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._paused: list[Process] = []
        self.guilty: dict[str, str] = {}
        """Workers that a fault has touched, and how: the controller may end them."""

    def begin(self, fault: Fault) -> None:
        """A fault happens; one that lasts ends by itself."""
        self._world.kernel.log("fault: %s", fault)
        getattr(self, fault.kind)(fault)

    def heal(self) -> None:
        """Nothing is wrong any more."""
        self._world.net.heal_all()
        for process in self._paused:
            process.resume()
        self._world.kernel.disk.broken_hosts.clear()

    # ---- processes ----------------------------------------------------------------------------

    def kill_worker(self, fault: Fault) -> None:
        worker = self._worker(fault.where)
        if worker is not None:
            self.guilty[worker.name] = "killed"
            worker.kill()

    def kill_two_workers(self, fault: Fault) -> None:
        first, second = self._worker(fault.where), self._worker(fault.other)
        for worker in (first, second):
            if worker is not None:
                self.guilty[worker.name] = "killed"
                worker.kill()

    def pause_worker(self, fault: Fault) -> None:
        worker = self._worker(fault.where)
        if worker is not None:
            self.guilty[worker.name] = "paused"
            self._pause(worker, fault.lasts_s)

    def kill_controller(self, fault: Fault) -> None:
        controller = self._world.ray.controller
        if controller is not None:
            controller.process.kill()

    def kill_gateway(self, fault: Fault) -> None:
        living = [g for g in self._world.gateways if not g.process.is_dead]
        if len(living) > 1:
            living[fault.where % len(living)].process.kill()

    # ---- small things -------------------------------------------------------------------------

    def _worker(self, number: int) -> Process | None:
        """A living worker."""
        workers = list(self._world.ray.workers.values())
        return workers[number % len(workers)].process if workers else None

    def _pause(self, process: Process, lasts_s: float) -> None:
        process.pause()
        self._paused.append(process)
        self._world.kernel.after(lasts_s, process.resume)

    def _hosts(self) -> list[str]:
        workers = self._world.ray.workers.values()
        return [HEAD, *dict.fromkeys(w.process.host for w in workers)]
