"""The state that one controller leaves to the next, and its restoration.

The workers keep a ``ControllerSnapshot``. ``collect`` gathers it with the state of the workers, and
``StateRestorer`` restores the controller from both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.controller.drain.drain import Draining
from cluster.controller.failover.collect import (
    CollectedState,
    lost_workers,
    reported_answers,
    restore_workers,
)
from cluster.controller.parts.cluster import Cluster
from cluster.controller.parts.generation_round import GenerationRound, Phase
from cluster.controller.parts.operations import Operations
from cluster.controller.parts.recovery import Recovery

_KEPT_ENTRIES = 64


class StateRestorer:
    """Saves and restores. Owned by the controller; one thread, time passed in."""

    def __init__(
        self,
        cluster: Cluster,
        recovery: Recovery,
        operations: Operations,
        draining: Draining,
        notes: Mapping[str, Any],
    ) -> None:
        """Make the workers keep the state of these parts, and ``notes`` for the next controller."""
        self._cluster = cluster
        self._recovery = recovery
        self._operations = operations
        self._draining = draining
        cluster.memories = {
            "history": lambda: cluster.history.to_list()[-_KEPT_ENTRIES:],
            "lost": lambda: lost_workers(cluster.workers),
            "notes": lambda: dict(notes),
            "recovery": recovery.memory,
            "operations": operations.memory,
            "draining": draining.memory,
        }

    def restore(self, collected: CollectedState, now: float) -> None:
        """Continue with running workers."""
        cluster = self._cluster
        number = collected.generation.number
        cluster.history.restore(collected.memory.get("history", ()))
        restore_workers(cluster.workers, collected)
        cluster.round = GenerationRound(collected.generation, now)
        self._recovery.restore(collected.memory.get("recovery", {}), now)
        cluster.round.answers.update(reported_answers(collected))
        cluster.highest_epoch = collected.highest_epoch
        missing = [
            m.name
            for m in collected.generation.members
            if m.name not in collected.greetings or cluster.workers[m.name].is_lost
        ]
        cause = "the controller was restarted"
        if collected.is_intact:
            cluster.experts_complete = True
            cluster.round.phase = Phase.RUNNING
            self._recovery.show_running()
            cluster.history.add(number, now, cause, "all members went on")
        elif missing:
            cluster.history.add(number, now, cause, "not all members have called")
            self._lose_missing(missing, now)
        else:
            self._recovery.reform(cause, now)
        self._recovery.ready(now)
        self._go_on_draining(collected, now)
        cluster.remember()

    def _lose_missing(self, names: Sequence[str], now: float) -> None:
        """Declare members lost that did not report; some were lost before."""
        cluster = self._cluster
        for name in names:
            if not cluster.workers[name].is_lost:
                cluster.workers.lose(name, "it did not call the restarted controller")
        cluster.remember()
        self._recovery.lost({n: cluster.workers[n].reason for n in names}, now)
        cluster.link.end_workers(names)

    def _go_on_draining(self, collected: CollectedState, now: float) -> None:
        """Continue the drain that was under way, and add drains that workers requested."""
        memory = collected.memory.get("draining", {})
        drain = memory.get("drain")
        goes_on = drain["operation"]["id"] if drain else None
        self._operations.restore(collected.memory.get("operations", ()), now, goes_on)
        self._draining.restore(memory, now)
        for name, greeting in collected.greetings.items():
            if greeting.asks_for_drain and not self._cluster.workers[name].is_lost:
                self._draining.requested(name, now)
