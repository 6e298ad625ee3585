"""What the controller knows of its cluster: the state that its parts share and change.

Each part decides on its own subject. It reads the cluster's state here, changes what belongs to its
subject, and acts on the workers by ``link``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

from cluster.config.cluster import LoadSection
from cluster.controller.parts.event_log import History
from cluster.controller.parts.generation_round import GenerationRound, Phase
from cluster.controller.parts.metrics import ControllerMetrics
from cluster.controller.parts.worker_table import WorkerTable
from cluster.core.frames import ControlFrame, ControllerSnapshot
from cluster.core.placement import ExpertPlacement
from cluster.core.states import ClusterState, next_state
from cluster.core.topology import Generation, Member
from cluster.load.tracker import LoadTracker

logger = logging.getLogger(__name__)

NodeIds = Mapping[str, frozenset[str]]
"""Address of a host -> ids of the living nodes there; more than one while an earlier node
has left unnoticed.
"""
_VERSIONS_OF_A_TERM = 1_000_000
"""Distance between the terms, so that a restarted controller never repeats a version."""


class WorkerLink(Protocol):
    """The actions of the controller on workers."""

    def send(self, worker: str, frame: ControlFrame) -> None:
        """Send to one worker; does nothing if it is not connected."""

    def start_worker(self, member: Member, placement: ExpertPlacement) -> None:
        """Start one more worker, in the background; it holds its part of ``placement``."""

    def end_workers(self, workers: Sequence[str]) -> None:
        """End these workers' processes, in the background."""

    def end_all(self) -> None:
        """End every worker in the background, then call ``Controller.all_ended``."""


class Cluster:
    """One cluster. One thread; ``now`` is in monotonic seconds."""

    def __init__(
        self,
        members: Sequence[Member],
        placement: ExpertPlacement,
        link: WorkerLink,
        *,
        model: Mapping[str, Any],
        load: LoadSection,
        now: float,
        num_slots: int = 0,
        can_grow: bool = True,
        term: int = 1,
        identity: str = "",
        host: str = "",
        wall_time_offset_s: float = 0.0,
    ) -> None:
        """``model`` holds name and path; the workers add the rest. ``can_grow``: an expert worker
        may hold more than its ``num_slots`` expert slots a bank.
        """
        self.link = link
        self.term = term
        self.identity = identity
        """Distinguishes controllers of one term."""
        self.host = host
        """The controller's own."""
        self.nodes: NodeIds | None = None
        """The living nodes; None before the first look."""
        self.num_slots = num_slots
        """Expert slots per bank of each expert worker."""
        self.room = None if can_grow else num_slots
        """The same as a limit; None where banks grow."""
        self.state = ClusterState.STARTING
        self.error: str | None = None
        """Why the start failed."""
        self.version = (term - 1) * _VERSIONS_OF_A_TERM + 1
        """Grows with every change of the snapshot."""
        self.order_numbers = count((term << 32) + 1)
        """Numbers of load orders, each used once in the life of the cluster."""
        self.placement = placement
        """The placement in force, or of the generation that is being formed."""
        self.highest_epoch = 0
        """Highest placement epoch of any change so far, whether or not it came into force."""
        self.experts_complete = False
        """Every expert had a slot when the newest generation was formed."""
        self.round = GenerationRound(Generation(number=0, members=()), now, Phase.STALLED)
        """The newest generation and its answers; number 0 before the first."""
        self.workers = WorkerTable(members, num_slots=num_slots, model=model, now=now)
        self.wall_time_offset_s = wall_time_offset_s
        """Added to ``now``, it is the time of day."""
        self.history = History(wall_time_offset_s)
        self.load = LoadTracker(load, now)
        """Expert load."""
        self.metrics = ControllerMetrics()
        self.memories: dict[str, Callable[[], Any]] = {}
        """By name, what returns the plain data that a part leaves to the next controller."""

    # ---- questions ------------------------------------------------------------------------

    @property
    def generation(self) -> Generation:
        """The newest generation; number 0 before the first."""
        return self.round.generation

    @property
    def is_up(self) -> bool:
        """Nothing has ended the cluster yet."""
        return self.state not in (ClusterState.DRAINING, ClusterState.STOPPED)

    @property
    def takes_orders(self) -> bool:
        """The cluster is neither starting nor ending."""
        return self.state is not ClusterState.STARTING and self.is_up

    @property
    def runs(self) -> bool:
        """The newest generation runs, and every expert has a copy."""
        return self.round.phase is Phase.RUNNING and self.is_up

    @property
    def is_forming(self) -> bool:
        """A generation is announced but does not run yet."""
        return self.round.phase is Phase.FORMING and self.is_up

    # ---- changes --------------------------------------------------------------------------

    def enter(self, state: ClusterState) -> None:
        """Change the state. Raises ``IllegalTransitionError``."""
        if self.state is state:
            return
        logger.info("%s -> %s", self.state.value, state.value)
        self.state = next_state(self.state, state)
        self.touch()

    def touch(self) -> None:
        """Mark the snapshot as changed."""
        self.version += 1

    def note(self, cause: str, effect: str, now: float) -> None:
        """Add to the history."""
        self.history.add(self.round.number, now, cause, effect)
        self.touch()

    def remember(self) -> None:
        """Make the workers keep the state that a restarted controller needs."""
        self.touch()
        memory = {"version": self.version, **{name: make() for name, make in self.memories.items()}}
        frame = ControllerSnapshot(term=self.term, controller=self.identity, memory=memory)
        for record in self.workers.alive():
            self.link.send(record.name, frame)
