"""Controller failover: a restarted controller restores its state from worker reports.

    every live worker connects and sends Register, WorkerReady, WorkerReport (and
    PeerLost if it lost a peer)
        ─▶ the newest generation that any worker knows, and its maps
        ─▶ if all members run this generation, it continues; otherwise the live ones form the next

The workers also keep state that only the controller needs (the history, lost workers and reasons):
the controller sends them a ``ControllerSnapshot``, which they return in ``WorkerReport``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from cluster.controller.adapters import Adapters
from cluster.controller.cluster import Cluster
from cluster.controller.controller_memory import ControllerMemory
from cluster.controller.draining import Draining
from cluster.controller.effects import EndWorkers
from cluster.controller.membership import GenerationRound, Phase
from cluster.controller.recovery import Recovery
from cluster.controller.scale import Scaling
from cluster.controller.workers import WorkerTable
from cluster.core import frames
from cluster.core.codec import from_plain
from cluster.core.errors import NotReadyError, ProtocolError
from cluster.core.placement import ExpertPlacement
from cluster.core.states import WorkerState
from cluster.core.topology import Generation, Member
from cluster.policy.failure import Liveness, unheard_hosts

_NO_GENERATION = Generation(number=0, members=())


@dataclass(slots=True)
class CollectedFrames:
    """Frames of one worker since it connected to the restarted controller."""

    register: frames.Register | None = None
    ready: frames.WorkerReady | None = None
    report: frames.WorkerReport | None = None
    asks_for_drain: bool = False
    """Whether the worker received SIGTERM and requests a drain."""

    def take(self, frame: frames.ControlFrame) -> None:
        """Record a frame of the worker; frames that a restart does not need are ignored."""
        match frame:
            case frames.Register():
                self.register = frame
            case frames.WorkerReady():
                self.ready = frame
            case frames.WorkerReport():
                self.report = frame
            case frames.PeerLost() if self.report and frame.generation == self.generation.number:
                self.report = replace(self.report, running=False)
            case frames.DrainRequest():
                self.asks_for_drain = True

    @property
    def generation(self) -> Generation:
        """The newest generation that the worker knows; number 0 if it knows none."""
        known = self.report.generation if self.report is not None else None
        return known or _NO_GENERATION

    @property
    def is_whole(self) -> bool:
        """Whether the worker has sent both ``Register`` and ``WorkerReport``."""
        return self.register is not None and self.report is not None

    def runs(self, number: int) -> bool:
        """Return whether the worker runs generation ``number`` now."""
        is_running = self.report is not None and self.report.running
        return is_running and self.generation.number == number


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectedState:
    """State of the cluster as the workers report it to a restarted controller."""

    generation: Generation
    """The newest generation that any worker knows."""
    placement: ExpertPlacement
    frames_by_worker: Mapping[str, CollectedFrames]
    """Frames of the workers that have connected, by name."""
    memory: ControllerMemory
    """The newest state that an earlier controller stored on the workers; empty without any."""

    @property
    def is_intact(self) -> bool:
        """Whether every member of the newest generation runs this generation."""
        number = self.generation.number
        names = [m.name for m in self.generation.members]
        return all(
            n in self.frames_by_worker and self.frames_by_worker[n].runs(number) for n in names
        )

    def silent_members(self, own_host: str, alive: Collection[str]) -> frozenset[str]:
        """Return the members of hosts without a report, if ``own_host`` may be the cause.

        This is assumed if most of the other hosts are without one; if not, returns no members.
        Only members in ``alive`` count.
        """
        pulses = [
            Liveness(name=m.name, heard_at=float(m.name in self.frames_by_worker), host=m.node)
            for m in self.generation.members
            if m.name in alive
        ]
        return unheard_hosts(pulses, own_host, since=1.0)

    @property
    def answers(self) -> dict[str, frames.GenerationReady]:
        """Member -> its report, converted to ``GenerationReady`` of the newest generation."""
        number, names = self.generation.number, {m.name for m in self.generation.members}
        return {
            name: frames.GenerationReady(
                generation=number,
                highest_step=received.report.highest_step,
                highest_epoch=received.report.highest_epoch,
                slots=received.report.slots,
            )
            for name, received in self.frames_by_worker.items()
            if name in names and received.report is not None
        }

    @property
    def highest_epoch(self) -> int:
        """Highest placement epoch that any worker knows, even if that epoch never ran."""
        reports = [g.report for g in self.frames_by_worker.values() if g.report is not None]
        return max((r.known_epoch for r in reports), default=0)

    @property
    def members(self) -> tuple[Member, ...]:
        """All known workers, including lost ones, sorted by role, rank and name."""
        known = {w.member.name: w.member for w in self.memory.lost}
        known |= {m.name: m for m in self.generation.members}
        for name, received in self.frames_by_worker.items():
            if received.register is not None:
                known.setdefault(name, received.register.member)
        return tuple(sorted(known.values(), key=lambda m: (m.role, m.rank, m.name)))


class ReportCollector:
    """Collects the reports of workers after a restart of the controller.

    Used by one thread; ``now`` is in monotonic seconds.
    """

    def __init__(
        self,
        expected: Iterable[str],
        now: float,
        *,
        limit_s: float,
        confirm_s: float,
        known: Iterable[str] = (),
        fresh: Iterable[str] = (),
    ) -> None:
        """Wait for the reports of the workers ``expected``, for at most ``limit_s`` seconds.

        The wait is ``confirm_s`` for a worker that has ended, and five times ``confirm_s`` for a
        worker that a peer reported lost, since its connection attempt may have been lost. There is
        no wait for workers that are only in ``known``, and none for ``fresh`` workers, which have
        never connected to a controller, had no generation, and perhaps were never started.
        """
        self._expected = set(expected)
        self._fresh = set(fresh)
        self._found = (self._expected | set(known)) - self._fresh
        self._frames_by_worker: dict[str, CollectedFrames] = {}
        self._deadline = now + limit_s
        self._confirm_s = confirm_s
        self._suspected_at: dict[str, float] = {}

    def frame(self, name: str, frame: frames.ControlFrame, now: float) -> None:
        """Record a frame of a worker. Raises ``ProtocolError`` for an unknown worker."""
        if name not in self._expected:
            raise ProtocolError(f"{name} is no worker of this cluster")
        self._frames_by_worker.setdefault(name, CollectedFrames()).take(frame)
        if isinstance(frame, frames.PeerLost):
            self._suspected_at.setdefault(frame.worker, now + 4 * self._confirm_s)

    def gone(self, name: str, now: float) -> None:
        """Record that a worker's connection or process ended. A live worker connects again."""
        self._frames_by_worker.pop(name, None)
        self._suspected_at[name] = min(now, self._suspected_at.get(name, now))

    def is_complete(self, now: float) -> bool:
        """Return whether all awaited reports have arrived, or the wait for them has ended."""
        awaited = self._expected - self._fresh
        return now >= self._deadline or not any(self._is_awaited(name, now) for name in awaited)

    def result(self) -> CollectedState | None:
        """Return the state of the cluster in the reports; None if there was no generation yet.

        Raises ``NotReadyError`` while a worker that has not reported may know a generation.
        """
        whole = {n: g for n, g in self._frames_by_worker.items() if g.is_whole}
        reports = [g.report for g in whole.values() if g.report is not None]
        formed = [(r.generation or _NO_GENERATION, r.placement) for r in reports if r.placement]
        if not formed and (unknown := sorted(self._found - set(whole))):
            raise NotReadyError(f"no report of {', '.join(unknown)}")
        if not formed:
            return None
        generation, placement = max(formed, key=lambda known: (known[0].number, known[1].epoch))
        return CollectedState(
            generation=generation,
            placement=placement,
            frames_by_worker=whole,
            memory=from_plain(
                max((r.memory for r in reports), key=lambda m: m.get("version", 0)),
                ControllerMemory,
            ),
        )

    def _is_awaited(self, name: str, now: float) -> bool:
        if self._frames_by_worker.get(name, CollectedFrames()).is_whole:
            return False
        suspected_at = self._suspected_at.get(name)
        return suspected_at is None or now - suspected_at < self._confirm_s


def continue_with(
    collected: CollectedState,
    cluster: Cluster,
    recovery: Recovery,
    draining: Draining,
    scaling: Scaling,
    adapters: Adapters,
    now: float,
) -> None:
    """Restore the state of a restarted controller from the collected reports of the workers."""
    memory = collected.memory
    drain, scale = memory.drain, memory.scale
    cluster.history.restore(memory.history)
    _restore_workers(cluster.workers, collected)
    cluster.load.resume(r.name for r in cluster.workers.alive() if r.member.runs_attention)
    known = GenerationRound(collected.generation, now, answers=collected.answers)
    cluster.membership.restore(known, collected.highest_epoch)
    cluster.membership.desired = memory.desired or cluster.desired
    cluster.known_nodes = memory.known_nodes
    cluster.adapters.restore(memory.adapters, memory.has_ordered_adapters)
    for record in list(cluster.workers.alive()):  # check them before they join other workers
        if why := cluster.workers.incompatibility(record.name, collected.generation):
            record.enter(WorkerState.LOST, why)
            cluster.effects.append(EndWorkers((record.name,)))
    gone = {r.name: r.reason for r in cluster.workers if r.is_lost}
    new = scale.added if scale else ()
    members = {m.name for m in collected.generation.members}
    cluster.places.restore(
        memory.closed,
        gone,
        now,
        names=memory.places,
        new=new,
        members=members,
        numbers=memory.numbers,
    )
    cluster.membership.set_roles(memory.num_prefill or cluster.places.num_prefill)
    for record in cluster.workers.alive():
        record.started_with = None if record.name in members else cluster.desired
    goes_on = {part.operation.id for part in (drain, scale) if part is not None}
    cluster.operations.restore(memory.operations, now, goes_on)
    if scale is not None:
        scaling.restore(scale, now)
    adapters.restore(now)
    _go_on(collected, cluster, recovery, now)
    recovery.ready(now)
    if drain is not None:
        draining.restore(drain, now)
    for name, received in collected.frames_by_worker.items():
        if received.asks_for_drain and not cluster.workers[name].is_lost:
            draining.requested(name, now)
    cluster.send_snapshot()


def _go_on(collected: CollectedState, cluster: Cluster, recovery: Recovery, now: float) -> None:
    """Continue the generation if all members run it with its experts; else form the next one."""
    cause, workers = "the controller was restarted", cluster.workers
    missing = [
        m.name
        for m in collected.generation.members
        if m.name not in collected.frames_by_worker or workers[m.name].is_lost
    ]
    if not missing and collected.is_intact and not cluster.round.missing(cluster.placement):
        cluster.membership.experts_complete = True
        cluster.round.enter(Phase.RUNNING)
        cluster.places.joined(cluster.round.members)
        recovery.show_running()
        cluster.history.add(cluster.round.number, now, cause, "all members continued")
    elif missing:
        cluster.history.add(cluster.round.number, now, cause, "not all members have connected")
        for name in missing:
            if not workers[name].is_lost:
                why = "it did not connect to the restarted controller"
                workers[name].enter(WorkerState.LOST, why)
        recovery.lost({n: workers[n].reason for n in missing}, now)
        cluster.effects.append(EndWorkers(tuple(missing)))
    else:
        cluster.reform(cause, now)


def _restore_workers(table: WorkerTable, collected: CollectedState) -> None:
    """Update the worker records from the reports; records without a report stay unchanged."""
    for worker in collected.memory.lost:
        record = table[worker.member.name]
        record.state, record.reason = worker.state, worker.reason  # restored, not a transition
    number = collected.generation.number
    members = {m.name for m in collected.generation.members}
    for name, received in collected.frames_by_worker.items():
        record = table[name]
        if record.is_lost:
            continue  # its next frame is answered with Shutdown
        assert received.register is not None
        record.register(received.register)
        if received.ready is None:
            continue
        record.ready(received.ready)
        table.learn_model(record)
        if name in members and received.runs(number):
            record.enter(WorkerState.SERVING)
