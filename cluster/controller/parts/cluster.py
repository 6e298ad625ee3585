"""The model that the parts of the controller share: what is known of the cluster, and the effects.

Each part decides on its own subject: it reads the state here, changes what belongs to its subject,
and adds effects. The life of a generation:

    form ─▶ NewGeneration to every member ─▶ GenerationReady from all, their slots hold the maps'
        ─▶ run ─▶ RunGeneration(first step above the highest step of any member)

A further loss before the end forms the next generation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from msgspec.structs import replace

from cluster.config.cluster import ClusterConfig
from cluster.controller.parts.adapter_table import AdapterTable
from cluster.controller.parts.drains import Drain
from cluster.controller.parts.effects import Effect, Release, Send
from cluster.controller.parts.host_disks import HostDisks
from cluster.controller.parts.membership import GenerationRound, MemberRecords, Phase
from cluster.controller.parts.memory import History, LostWorker, Memory
from cluster.controller.parts.metrics import ControllerMetrics, MoveReason
from cluster.controller.parts.operations import Operations
from cluster.controller.parts.scales import Scale
from cluster.controller.parts.traces import ChangeTraces, OpenTrace
from cluster.controller.parts.workers import WorkerTable
from cluster.core.codec import to_plain
from cluster.core.frames import (
    ControlFrame,
    ControllerSnapshot,
    LowDisk,
    NewGeneration,
    RunGeneration,
)
from cluster.core.load_profile import LoadProfile
from cluster.core.placement import ExpertPlacement
from cluster.core.states import ClusterState, WorkerState, next_state
from cluster.core.topology import Generation, Member
from cluster.load.tracker import LoadTracker
from cluster.policy.coverage import describe_members
from cluster.policy.places import NodeIds, Places
from cluster.tracing import names

logger = logging.getLogger(__name__)

_LEFT_OPERATIONS = 16
"""Operations that the next controller gets."""
_VERSIONS_OF_A_TERM = 1_000_000
"""Distance between the terms, so that a restarted controller never repeats a version."""


class Cluster:
    """One cluster. One thread; ``now`` is in monotonic seconds."""

    def __init__(
        self,
        members: Sequence[Member],
        placement: ExpertPlacement,
        config: ClusterConfig,
        *,
        now: float,
        num_slots: int = 0,
        term: int = 1,
        identity: str = "",
        host: str = "",
        wall_time_offset_s: float = 0.0,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """``wall_time_offset_s`` added to ``now`` is the time of day; ``notes``: see ``Memory``."""
        self.config = config
        self.began_at = now
        """Monotonic time at which this controller began."""
        self.effects: list[Effect] = []
        """Of the event under way."""
        self._is_remembered = True
        self.term = term
        self.identity = identity
        """Distinguishes controllers of one term."""
        self.host = host
        """The controller's own."""
        self.nodes: NodeIds | None = None
        """The living nodes; None before the first look."""
        self.known_nodes: frozenset[str] = frozenset()
        """Ids of nodes that are accounted for, where the numbers of workers follow the nodes."""
        self.num_slots = num_slots
        """Expert slots per bank of each expert worker."""
        self.room = num_slots if config.workers.device == "cuda" else None
        """The same as a limit; None where banks grow."""
        self.state = ClusterState.STARTING
        self.error: str | None = None
        """Why the start failed."""
        self.version = (term - 1) * _VERSIONS_OF_A_TERM + 1
        """Grows with every change of the snapshot."""
        self.sent_version = 0
        """That of the memory which workers were last told to keep."""
        self.order_numbers = count((term << 32) + 1)
        """Numbers of load orders and requests, each used once in the life of the cluster."""
        self.places = Places(members)
        self.late: tuple[str, ...] = ()
        """Workers for which steps wait that are wanted, or for which a generation waits."""
        self.workers = WorkerTable(members, model=config.model, now=now)
        self.membership = MemberRecords(placement, self.workers, self.places, now)
        self.history = History(wall_time_offset_s)
        self.load = LoadTracker(config.load, now)
        """Expert load."""
        self.metrics = ControllerMetrics({m.role for m in members})
        self.operations = Operations(term, wall_time_offset_s, self.remember)
        self.drain: Drain | None = None
        """The drain under way."""
        self.scale: Scale | None = None
        """The scaling under way."""
        self.adapters = AdapterTable()
        self.disks = HostDisks()
        self.traces = ChangeTraces(identity, config.observability.otlp_endpoint is not None)
        self.notes = notes or {}

    # ---- questions ------------------------------------------------------------------------

    @property
    def round(self) -> GenerationRound:
        """The newest generation and its answers, see ``MemberRecords``."""
        return self.membership.round

    @property
    def generation(self) -> Generation:
        """The newest generation; number 0 before the first."""
        return self.membership.round.generation

    @property
    def placement(self) -> ExpertPlacement:
        """The placement in force, see ``MemberRecords``."""
        return self.membership.placement

    @property
    def desired(self) -> ExpertPlacement:
        """The placement of the whole cluster, see ``MemberRecords``."""
        return self.membership.desired

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

    @property
    def new_workers(self) -> frozenset[str]:
        """Workers that scaling adds and that have not been in a generation that ran."""
        added = self.scale.added if self.scale else ()
        return frozenset(self.places.workers_of(p for p in added if self.places.is_new(p)))

    def unready_workers(self) -> list[str]:
        """Those of the new workers that others still wait for."""
        table = self.workers
        return sorted(n for n in self.new_workers if n not in table or not table[n].may_join)

    @property
    def profile(self) -> LoadProfile | None:
        """The load that was expected at the start."""
        profile = self.notes.get("profile")
        return LoadProfile.from_dict(profile) if profile else None

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return int(self.notes.get("top_k", 1))

    def is_kept(self, version: int) -> bool:
        """Whether a worker keeps the memory of this version, or none lives that could."""
        alive = list(self.workers.alive())
        return not alive or any(r.kept_version >= version for r in alive)

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

    def paused(self, generation: int, pause_s: float) -> None:
        """A gateway's streams stood still for this time when the generation formed."""
        self.history.paused(generation, pause_s)
        self.touch()

    def host_has(self, low_disks: tuple[LowDisk, ...], host: str = "", reporter: str = "") -> None:
        """The nearly full disks of a host, by a gateway; by default those of the controller's."""
        if self.disks.report(low_disks, host or self.host, reporter):
            self.touch()

    def remember(self) -> None:
        """Make the workers keep the state that a restarted controller needs, before they get any
        other frame of the event under way.
        """
        self.touch()
        self._is_remembered = False

    def memory(self) -> Memory:
        """The state that a restarted controller needs."""
        is_whole = self.desired.banks == self.placement.banks
        return Memory(
            version=self.version,
            history=self.history.newest(),
            lost=tuple(
                LostWorker(member=r.member, state=r.state, reason=r.reason)
                for r in self.workers
                if r.is_lost
            ),
            notes=dict(self.notes),
            desired=None if is_whole else self.desired,
            places=self.places.names(),
            closed=self.places.closed,
            operations=tuple(self.operations.kept)[-_LEFT_OPERATIONS:],
            drain=self.drain,
            scale=self.scale,
            known_nodes=self.known_nodes,
            adapters=tuple(self.adapters.by_key.values()),
            has_ordered_adapters=self.adapters.was_ordered,
        )

    def nodes_alive(self, nodes: NodeIds, now: float) -> None:
        """The living nodes: places of nodes that have left are to be filled."""
        self.nodes = nodes
        if self.places.nodes_alive(nodes):
            self.remember()

    def remove_places(self, places: Iterable[str]) -> None:
        """Places without a serving worker are no part of the cluster any more."""
        if names := tuple(places):
            self.places.remove(names)
            self.effects.append(Release(names))
            self.remember()

    def moved(self, reason: MoveReason, num_slots: int, num_bytes: int, seconds: float) -> None:
        """Weights have moved, see ``ControllerMetrics.moved``."""
        self.metrics.moved(reason, num_slots, num_bytes, seconds)
        attributes = {names.REASON: reason, names.SLOTS: num_slots, names.BYTES: num_bytes}
        self.end_trace(self.begin_trace(names.MIGRATION), seconds, attributes)

    def begin_trace(self, name: str) -> OpenTrace:
        """The trace of a change that begins now."""
        self.touch()
        return self.traces.begin(name)

    def end_trace(
        self, opened: OpenTrace, seconds: float, attributes: Mapping[str, Any], error: str = ""
    ) -> None:
        """The change has ended just now; ``seconds``, ``attributes``, ``error``: see ``Trace``."""
        self.touch()
        self.effects.append(self.traces.end(opened, seconds, attributes, error))

    # ---- effects --------------------------------------------------------------------------

    def send(self, frame: ControlFrame, *workers: str) -> None:
        """Send a frame to these workers."""
        self.effects.append(Send(frame, workers))

    def take_effects(self) -> list[Effect]:
        """The effects since the last call, to be carried out in this order."""
        if not self._is_remembered:
            self.sent_version = self.version
            frame = ControllerSnapshot(
                term=self.term,
                version=self.version,
                controller=self.identity,
                memory=to_plain(self.memory()),
                places=self.places.names(),
            )
            self.effects.insert(0, Send(frame, tuple(r.name for r in self.workers.alive())))
        effects, self.effects, self._is_remembered = self.effects, [], True
        return effects

    # ---- generations ----------------------------------------------------------------------

    def form(self, members: Sequence[Member], placement: ExpertPlacement, now: float) -> None:
        """Announce the next generation to all its members."""
        if self.state is not ClusterState.STARTING:
            self.enter(ClusterState.RECOVERING)
        self.membership.form(members, placement, now)
        self.touch()
        order = NewGeneration(
            term=self.term,
            controller=self.identity,
            generation=self.generation,
            placement=self.placement,
            drained=[r.name for r in self.workers if r.state is WorkerState.DRAINED],
            places=self.places.names(),
        )
        self.send(order, *(m.name for m in self.generation.members))

    def reform(self, cause: str, now: float) -> None:
        """Have all members form a generation with the placement in force."""
        self.form(self.round.members, self.placement, now)
        self.note(cause, f"go on with {describe_members(self.round.members)}", now)

    def run(self, now: float) -> bool:
        """Run the generation, whose members have all answered; whether it runs now."""
        formed = self.round
        if formed.highest_epoch > self.placement.epoch:
            # a survivor ran a later epoch than the controller knew; the new one must be higher
            placement = replace(self.placement, epoch=formed.highest_epoch + 1)
            self.form(formed.members, placement, now)
            return False
        self.membership.run(now)
        order = RunGeneration(generation=formed.number, first_step=formed.first_step)
        self.send(order, *(m.name for m in formed.members))
        return True
