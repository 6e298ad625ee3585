"""The state that one controller leaves to the next, and its restoration.

The workers keep a ``ControllerSnapshot``. ``collect`` gathers it with the state of the workers, and
``StateRestorer`` restores the controller from both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cluster.controller.drain.drain import Draining
from cluster.controller.failover.collect import (
    CollectedState,
    make_memory,
    reported_answers,
    restore_workers,
)
from cluster.controller.parts.event_log import History
from cluster.controller.parts.generation import Generations
from cluster.controller.parts.host import ControllerHost
from cluster.controller.parts.operations import Operations
from cluster.controller.parts.recovery import Recovery
from cluster.controller.parts.worker_link import WorkerLink
from cluster.core.frames import ControllerSnapshot


class RestoreHost(ControllerHost, Protocol):
    """The parts of the controller that are saved and restored.

    They do not exist yet when the ``StateRestorer`` is made.
    """

    version: int
    generations: Generations
    recovery: Recovery
    operations: Operations
    draining: Draining
    history: History

    def show_running(self) -> None:
        """Enter the state of a cluster whose newest generation runs."""


class StateRestorer:
    """Saves and restores. Owned by the controller; one thread, time passed in."""

    def __init__(
        self,
        host: RestoreHost,
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

    def send_snapshot(self) -> None:
        """Make the workers keep the state that the next controller needs."""
        host = self._host
        memory = make_memory(host.history, host.workers, self._notes)
        memory["recovery"] = host.recovery.memory()
        memory["operations"] = host.operations.memory()
        memory["draining"] = host.draining.memory()
        memory["version"] = host.version
        snapshot = ControllerSnapshot(term=self._term, controller=self._identity, memory=memory)
        for record in host.workers.alive():
            self._link.send(record.name, snapshot)

    def restore(self, collected: CollectedState, now: float) -> None:
        """Continue with running workers."""
        host = self._host
        host.history.restore(collected.memory.get("history", ()))
        restore_workers(host.workers, collected)
        host.generations.restore(collected.generation, now)
        host.recovery.restore(collected.memory.get("recovery", {}), now)
        for name, answer in reported_answers(collected):
            host.generations.round.answer(name, answer)
        missing = [
            m.name
            for m in collected.generation.members
            if m.name not in collected.greetings or host.workers[m.name].is_lost
        ]
        cause = "the controller was restarted"
        number = collected.generation.number
        if collected.is_intact:
            host.generations.go_on()
            host.show_running()
            host.history.add(number, now, cause, "all members went on")
            host.recovery.ready(now)
        elif missing:
            host.history.add(number, now, cause, "not all members have called")
            self._lose_missing(missing, now)
        else:
            host.reform(cause, now)
        self._go_on_draining(collected, now)
        self.send_snapshot()

    def _lose_missing(self, names: Sequence[str], now: float) -> None:
        """Declare members lost that did not report; some were lost before."""
        host = self._host
        for name in names:
            if not host.workers[name].is_lost:
                host.workers.lose(name, "it did not call the restarted controller")
        self.send_snapshot()
        host.recovery.lost({n: host.workers[n].reason for n in names}, now)
        self._link.end_workers(names)

    def _go_on_draining(self, collected: CollectedState, now: float) -> None:
        """Continue the drain that was under way, and add drains that workers requested."""
        host, memory = self._host, collected.memory.get("draining", {})
        goes_on = (memory.get("drain") or {}).get("operation")
        host.operations.restore(collected.memory.get("operations", ()), now, goes_on)
        host.draining.restore(memory, now)
        for name, greeting in collected.greetings.items():
            if greeting.asks_for_drain and not host.workers[name].is_lost:
                host.draining.requested(name, now)
