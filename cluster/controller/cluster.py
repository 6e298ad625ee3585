"""The model that the parts of the controller share: the state of the cluster, and the effects.

Each part decides on its own subject: the part reads the state of ``Cluster``, changes the state of
its subject, and adds effects. The life of a generation:

    form ─▶ NewGeneration to every member ─▶ GenerationReady from all, experts in their slots
        ─▶ run ─▶ RunGeneration(first step above the highest step of any member)

If a member is lost before RunGeneration, the next generation is formed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from msgspec.structs import replace

from cluster.config.cluster import ClusterConfig
from cluster.controller.adapter_table import AdapterTable
from cluster.controller.controller_memory import (
    ControllerMemory,
    History,
    LostWorker,
    memory_keepers,
    plain_memory,
)
from cluster.controller.drain_operation import Drain
from cluster.controller.effects import Effect, ReleasePlaces, SendFrame
from cluster.controller.host_disks import HostDisks
from cluster.controller.membership import GenerationRound, MemberRecords, Phase
from cluster.controller.metrics import ControllerMetrics, MoveReason
from cluster.controller.operations import Operations
from cluster.controller.scale_operation import Scale
from cluster.controller.traces import ChangeTraces, OpenTrace
from cluster.controller.workers import WorkerTable
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
"""Maximum number of operations that a restarted controller gets."""
_VERSIONS_OF_A_TERM = 1 << 32
"""Number of snapshot versions reserved for each term, so that a new controller repeats none."""


class Cluster:
    """State of one cluster. Used by one thread; ``now`` is in monotonic seconds."""

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
        """Create the state of a cluster whose workers have not registered yet.

        ``wall_time_offset_s`` plus ``now`` is the time of day. ``notes`` are arguments of the
        cluster's start, which a restarted controller gets.
        """
        self.config = config
        self.began_at = now
        """Monotonic time at which this controller process began to serve the cluster."""
        self.effects: list[Effect] = []
        """Effects (actions for the controller actor) that the current event has added so far."""
        self._is_remembered = True
        self._sent_places: tuple[str, ...] = ()
        self.term = term
        self.identity = identity
        """Identity of this controller, to distinguish controllers that claim the same term."""
        self.host = host
        """Host on which the controller runs, as in ``Member.node``."""
        self.nodes: NodeIds | None = None
        """Ids of the live Ray nodes by address; None before Ray lists them for the first time."""
        self.known_nodes: frozenset[str] = frozenset()
        """Ids of nodes that ``NodeFollower`` does not treat as new: pool sizes include them."""
        self.num_slots = num_slots
        """Expert slots per bank of each expert worker."""
        self.room = num_slots if config.workers.device == "cuda" else None
        """Maximum number of expert slots per bank of a worker; None if workers can add slots."""
        self.state = ClusterState.STARTING
        self.error: str | None = None
        """Reason why the start of the cluster failed; None if it did not fail."""
        self.version = (term - 1) * _VERSIONS_OF_A_TERM + 1
        """Version of the state that gateways and workers get; grows with every change."""
        self.sent_version = 0
        """Version of the last controller snapshot for the workers; 0 before the first."""
        self.order_numbers = count((term << 32) + 1)
        """Source of unique numbers for commands and status requests, also after a restart."""
        members = [config.workers.with_group(member) for member in members]
        self.places = Places(members)
        self.late: tuple[str, ...] = ()
        """Names of the workers for which steps, or the forming generation, wait."""
        self.workers = WorkerTable(members, model=config.model, now=now)
        self.membership = MemberRecords(placement, self.workers, self.places, now)
        self.history = History(wall_time_offset_s)
        self.load = LoadTracker(config.load, now)
        """Load of the experts (tokens by expert) over time."""
        self.metrics = ControllerMetrics({m.role for m in members})
        self.operations = Operations(term, wall_time_offset_s, self.send_snapshot)
        self.drain: Drain | None = None
        """The running drain; None if no drain runs."""
        self.scale: Scale | None = None
        """The running scaling, until all new workers serve; None without one."""
        self.adapters = AdapterTable()
        self.disks = HostDisks()
        self.traces = ChangeTraces(identity, config.observability.otlp_endpoint is not None)
        self.notes = notes or {}

    # ---- queries --------------------------------------------------------------------------

    @property
    def round(self) -> GenerationRound:
        """The newest generation, with its phase and the replies of its members."""
        return self.membership.round

    @property
    def generation(self) -> Generation:
        """The newest generation; before the first one, an empty generation with number 0."""
        return self.membership.round.generation

    @property
    def placement(self) -> ExpertPlacement:
        """The placement of experts in force, or that of the forming generation."""
        return self.membership.placement

    @property
    def desired(self) -> ExpertPlacement:
        """The desired placement: the placement of experts for the complete cluster."""
        return self.membership.desired

    @property
    def is_up(self) -> bool:
        """Whether the cluster is neither ending nor stopped."""
        return self.state not in (ClusterState.DRAINING, ClusterState.STOPPED)

    @property
    def can_accept_operations(self) -> bool:
        """Whether the cluster is neither starting nor ending."""
        return self.state is not ClusterState.STARTING and self.is_up

    @property
    def runs(self) -> bool:
        """Whether the newest generation runs, with a copy of every expert."""
        return self.round.phase is Phase.RUNNING and self.is_up

    @property
    def is_forming(self) -> bool:
        """Whether a generation is announced but does not run yet."""
        return self.round.phase is Phase.FORMING and self.is_up

    @property
    def new_workers(self) -> frozenset[str]:
        """Names of workers that the running scaling adds, until a generation has run with them."""
        added = self.scale.added if self.scale else ()
        return frozenset(self.places.workers_of(p for p in added if self.places.is_new(p)))

    def unready_workers(self) -> list[str]:
        """Return the names of the ``new_workers`` that may not join a generation yet, sorted."""
        table = self.workers
        return sorted(n for n in self.new_workers if n not in table or not table[n].may_join)

    @property
    def profile(self) -> LoadProfile | None:
        """The load profile with which the cluster was started; None without a profile."""
        profile = self.notes.get("profile")
        return LoadProfile.from_dict(profile) if profile else None

    @property
    def top_k(self) -> int:
        """Number of routed experts that the router chooses for each token."""
        return int(self.notes.get("top_k", 1))

    def is_kept(self, version: int) -> bool:
        """Return whether a live worker stored this snapshot or a newer one, or none is alive."""
        alive = list(self.workers.alive())
        return not alive or any(r.kept_version >= version for r in alive)

    # ---- changes --------------------------------------------------------------------------

    def enter(self, state: ClusterState) -> None:
        """Change the state of the cluster. Raises ``IllegalTransitionError``."""
        if self.state is state:
            return
        logger.info("%s -> %s", self.state.value, state.value)
        self.state = next_state(self.state, state)
        self.touch()

    def touch(self) -> None:
        """Increase the version of the state, so that gateways get the changed state."""
        self.version += 1

    def note(self, cause: str, effect: str, now: float) -> None:
        """Add a change of the cluster to the history: its cause and its effect."""
        self.history.add(self.round.number, now, cause, effect)
        self.touch()

    def paused(self, generation: int, pause_s: float) -> None:
        """Record for how many seconds a gateway's token streams paused until a generation ran."""
        self.history.paused(generation, pause_s)
        self.touch()

    def update_low_disks(
        self, low_disks: tuple[LowDisk, ...], host: str = "", reporter: str = ""
    ) -> None:
        """Record the nearly full disks of a host; an empty ``host`` is the controller's host.

        ``reporter``: the gateway that found the disks; empty for the controller's own process.
        """
        if self.disks.report(low_disks, host or self.host, reporter):
            self.touch()

    def send_snapshot(self) -> None:
        """Make the next ``take_effects`` first send the controller snapshot to live workers."""
        self.touch()
        self._is_remembered = False

    def memory(self) -> ControllerMemory:
        """Return the state that a restarted controller needs."""
        is_whole = self.desired.banks == self.placement.banks
        lost = [r for r in self.workers if r.is_lost]
        return ControllerMemory(
            version=self.version,
            history=self.history.newest(),
            lost=tuple(LostWorker(member=r.member, state=r.state, reason=r.reason) for r in lost),
            notes=dict(self.notes),
            desired=None if is_whole else self.desired,
            places=self.places.names(),
            num_prefill=self.places.num_prefill,
            numbers=self.places.numbers,
            closed=self.places.closed,
            operations=tuple(self.operations.kept)[-_LEFT_OPERATIONS:],
            drain=self.drain,
            scale=self.scale,
            known_nodes=self.known_nodes,
            adapters=tuple(self.adapters.by_key.values()),
            has_ordered_adapters=self.adapters.was_ordered,
        )

    def nodes_alive(self, nodes: NodeIds, now: float) -> None:
        """Record the ids of the live nodes, and reopen places that waited for a node to leave."""
        self.nodes = nodes
        if self.places.nodes_alive(nodes):
            self.send_snapshot()

    def remove_places(self, places: Iterable[str]) -> None:
        """Remove places from the cluster; none of these places has a serving worker."""
        if names := tuple(places):
            self.places.remove(names)
            self.effects.append(ReleasePlaces(names))
            self.send_snapshot()

    def moved(self, reason: MoveReason, num_slots: int, num_bytes: int, seconds: float) -> None:
        """Record a move of expert weights in the metrics and as a trace.

        The arguments are described in ``ControllerMetrics.moved``.
        """
        self.metrics.moved(reason, num_slots, num_bytes, seconds)
        attributes = {names.REASON: reason, names.SLOTS: num_slots, names.BYTES: num_bytes}
        self.end_trace(self.begin_trace(names.MIGRATION), seconds, attributes)

    def begin_trace(self, name: str) -> OpenTrace:
        """Begin the trace of a change of the cluster; ``name`` is the name of the span."""
        self.touch()
        return self.traces.begin(name)

    def end_trace(
        self, opened: OpenTrace, seconds: float, attributes: Mapping[str, Any], error: str = ""
    ) -> None:
        """End the trace of a change of the cluster; ``RecordTrace`` describes the arguments."""
        self.touch()
        self.effects.append(self.traces.end(opened, seconds, attributes, error))

    # ---- effects --------------------------------------------------------------------------

    def send(self, frame: ControlFrame, *workers: str) -> None:
        """Add an effect that sends ``frame`` (a control message) to these workers."""
        self.effects.append(SendFrame(frame, workers))

    def take_effects(self) -> list[Effect]:
        """Remove and return the pending effects, in the order in which to carry them out."""
        if not self._is_remembered:
            alive = self.workers.alive()
            is_known = self._sent_places == self.places.names()  # else all workers learn them
            keepers = memory_keepers(alive) if is_known else tuple(r.name for r in alive)
            self.sent_version, self._sent_places = self.version, self.places.names()
            frame = ControllerSnapshot(
                term=self.term,
                version=self.version,
                controller=self.identity,
                memory=plain_memory(self.memory()),
                places=self._sent_places,
            )
            self.effects.insert(0, SendFrame(frame, keepers))
        effects, self.effects, self._is_remembered = self.effects, [], True
        return effects

    # ---- generations ----------------------------------------------------------------------

    def form(self, members: Sequence[Member], placement: ExpertPlacement, now: float) -> None:
        """Form the next generation: announce it, with this placement, to ``members``."""
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
        """Form the next generation from the same members, with the placement in force."""
        self.form(self.round.members, self.placement, now)
        self.note(cause, f"continue with {describe_members(self.round.members)}", now)

    def run(self, now: float) -> bool:
        """Run the forming generation, after all its members have replied.

        Returns False if the next generation was formed instead, with a higher placement epoch,
        because a member has run a later epoch than the controller knew.
        """
        formed = self.round
        if formed.highest_epoch > self.placement.epoch:
            # a member ran a later epoch than the controller knew, so the new one must be higher
            placement = replace(self.placement, epoch=formed.highest_epoch + 1)
            self.form(formed.members, placement, now)
            self.history.superseded(formed.number, self.round.number)
            return False
        self.membership.run(now)
        order = RunGeneration(generation=formed.number, first_step=formed.first_step)
        self.send(order, *(m.name for m in formed.members))
        return True
