"""What one controller leaves to the next, and how the next takes over workers that run.

The workers keep a ``Keepsake`` for whoever restarts; ``cluster.adoption`` tells what they are and
what they know, and ``Succession`` brings the controller to where they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cluster.adoption import Adopted, make_memory, restore_workers, standing_answers
from cluster.control_frames import Keepsake
from cluster.draining import Draining
from cluster.generations import Generations
from cluster.history import History
from cluster.operations import Operations
from cluster.recovery import Recovery
from cluster.worker_link import WorkerLink
from cluster.worker_table import WorkerTable


class SuccessionHost(Protocol):
    """What of the controller is kept for the next one, and who brings it to where the workers are.

    Nothing of it is there yet when the ``Succession`` is made.
    """

    version: int
    workers: WorkerTable
    generations: Generations
    recovery: Recovery
    operations: Operations
    draining: Draining
    history: History

    def show_running(self) -> None:
        """Enter the state of a cluster whose newest generation runs."""

    def reform(self, cause: str, now: float) -> None:
        """Have all members form a new generation."""


class Succession:
    """See the module. Owned by the controller; one thread, time passed in."""

    def __init__(
        self,
        host: SuccessionHost,
        link: WorkerLink,
        *,
        term: int,
        identity: str,
        notes: Mapping[str, Any],
    ) -> None:
        """``term`` and ``identity`` are the controller's; ``notes`` are for the next one."""
        self._host = host
        self._link = link
        self._term = term
        self._identity = identity
        self._notes = notes

    def send_keepsake(self) -> None:
        """Have the workers keep what the next controller must know."""
        host = self._host
        memory = make_memory(host.history, host.workers, self._notes)
        memory["recovery"] = host.recovery.memory()
        memory["operations"] = host.operations.memory()
        memory["draining"] = host.draining.memory()
        memory["version"] = host.version
        keepsake = Keepsake(term=self._term, controller=self._identity, memory=memory)
        for record in host.workers.alive():
            self._link.send(record.name, keepsake)

    def adopt(self, adopted: Adopted, now: float) -> None:
        """Take over workers that run."""
        host = self._host
        host.history.restore(adopted.memory.get("history", ()))
        restore_workers(host.workers, adopted)
        host.generations.adopt(adopted.generation, now)
        host.recovery.restore(adopted.memory.get("recovery", {}), now)
        for name, answer in standing_answers(adopted):
            host.generations.round.answer(name, answer)
        missing = [
            m.name
            for m in adopted.generation.members
            if m.name not in adopted.greetings or host.workers[m.name].is_lost
        ]
        cause = "the controller was restarted"
        number = adopted.generation.number
        if adopted.is_intact:
            host.generations.go_on()
            host.show_running()
            host.history.add(number, now, cause, "all members went on")
            host.recovery.ready(now)
        elif missing:
            host.history.add(number, now, cause, "not all members have called")
            self._lose_missing(missing, now)
        else:
            host.reform(cause, now)
        self._go_on_draining(adopted, now)
        self.send_keepsake()

    def _lose_missing(self, names: Sequence[str], now: float) -> None:
        """Members that were not found; some had been lost before."""
        host = self._host
        for name in names:
            if not host.workers[name].is_lost:
                host.workers.lose(name, "it did not call the restarted controller")
        self.send_keepsake()
        host.recovery.lost({n: host.workers[n].reason for n in names}, now)
        self._link.end_workers(names)

    def _go_on_draining(self, adopted: Adopted, now: float) -> None:
        """With the drain that was under way, and with what workers have wished for."""
        host, memory = self._host, adopted.memory.get("draining", {})
        goes_on = (memory.get("drain") or {}).get("operation")
        host.operations.restore(adopted.memory.get("operations", ()), now, goes_on)
        host.draining.restore(memory, now)
        for name, greeting in adopted.greetings.items():
            if greeting.wishes_drain and not host.workers[name].is_lost:
                host.draining.wish(name, now)
