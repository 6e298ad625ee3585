"""Recovery: members leave or join, survivors load experts, new workers fill empty places.

    a member is lost ──▶ the others continue, and load the experts without a copy
        ──▶ a new worker starts in its place ──▶ it is ready ──▶ a generation with it

The failure policy and ``Places`` decide; ``Recovery`` acts. Loading and the forming
of the generation run at the same time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from cluster.controller.cluster import Cluster
from cluster.controller.effects import StartWorker
from cluster.controller.expert_load_commands import ExpertLoadCommand, ExpertLoadCommands
from cluster.controller.membership import Phase
from cluster.controller.settings import ControllerSettings
from cluster.controller.traces import OpenTrace
from cluster.core.frames import ExpertsLoaded, GenerationReady
from cluster.core.holders import expert_holders
from cluster.core.states import ClusterState, WorkerState
from cluster.core.topology import LARGE_CLUSTER, Member, Role
from cluster.planner.stages import SlotFill
from cluster.policy.coverage import ExpertHoldings, decide_members, describe_losses, listed
from cluster.policy.places import place_of
from cluster.tracing.names import LOST_WORKERS, RECOVERY

logger = logging.getLogger(__name__)

_ROOM_WAIT_S = 10.0
_MAX_RETRY_S = 60.0
_JOIN_PAUSE = 10.0
"""Shortest time between a generation of a large cluster and the next one in which workers join, as
a multiple of the time for which steps paused for the former."""
_MAX_JOIN_PAUSE_S = 5.0


class RecoveryProblem(StrEnum):
    """Problem of a worker or a place; the text follows the name of the worker or place."""

    CANNOT_LOAD = "cannot load experts"
    LEFT_OUT = "is left out"
    WAITS_FOR_ROOM = "waits for room"


class Recovery:
    """Handles members that leave and join. Owned by the controller and used by one thread."""

    def __init__(self, cluster: Cluster, limits: ControllerSettings) -> None:
        """``cluster`` has the workers and the placement that recovery restores."""
        self._cluster = cluster
        self._limits = limits
        self._failed: list[SlotFill] = []
        self._barred: dict[int, str] = {}
        self._lost: dict[str, Role] = {}
        """Members (name -> role) that were lost since the last generation ran."""
        self._lost_at = 0.0
        self._trace: OpenTrace | None = None
        """Trace of the running recovery; None if no recovery runs."""
        self._retry_s = limits.retry_s
        self._retry_at = 0.0
        self._join_at: float | None = None
        """Monotonic time until which workers that are ready wait to join; None without a wait."""
        self.reloads = ExpertLoadCommands(cluster)
        """Commands to load experts that recovery has sent and workers have not answered yet."""

    def problems(self, now: float) -> list[str]:
        """Describe the problems that keep the cluster incomplete, for the status."""
        names = {r.member.device: r.name for r in self._cluster.workers.alive()}
        found = [
            f"{names.get(device, f'device {device}')} {RecoveryProblem.CANNOT_LOAD}: {error}"
            for device, error in sorted(self._barred.items())
        ]
        closed = self._cluster.places.closed
        left_out = RecoveryProblem.LEFT_OUT
        found += [f"{name} {left_out}: {place.why}" for name, place in closed.items()]
        for record in self._cluster.workers.alive():
            waits = record.state is WorkerState.STARTING and not record.has_process
            if waits and record.started_with is not None and now - record.since > _ROOM_WAIT_S:
                found.append(f"{record.name} {RecoveryProblem.WAITS_FOR_ROOM}")
        return found

    # ---- events ---------------------------------------------------------------------------

    def lost(self, reasons: Mapping[str, str], now: float) -> None:
        """Handle lost workers (name -> reason), which the worker table has already recorded."""
        for name, reason in reasons.items():
            self._cluster.places.lost(name, reason, now)
        self.reloads.drop(reasons)
        members = self._cluster.round.members
        gone = {m.name: reasons[m.name] for m in members if m.name in reasons}
        others = {n: r for n, r in reasons.items() if n not in gone}
        if others:
            self._cluster.note(describe_losses(others), self._sequel(others), now)
        if gone:
            self._lost_at = self._lost_at if self._lost else now
            self._trace = self._trace or self._cluster.begin_trace(RECOVERY)
            self._lost |= {m.name: m.role for m in members if m.name in gone}
            survivors = [m for m in members if m.name not in gone]
            if self._cluster.round.before is not None and gone.keys() <= self._cluster.round.joins:
                self._cluster.membership.placement = self._cluster.round.before  # no loads needed
            self._go_on(survivors, describe_losses(gone), now)

    def _sequel(self, names: Iterable[str]) -> str:
        """Describe what follows the loss of workers that were in no generation."""
        places, found = self._cluster.places, list[str]()
        for place in map(place_of, names):
            if place in places.closed:
                found.append(f"{place} is left out")
            elif place in places.roles():
                found.append("start another one")
            else:  # scaling has removed it
                found.append(f"continue without {place}")
        return "; ".join(dict.fromkeys(found))

    def ready(self, now: float) -> None:
        """Form a generation with the workers that have become ready, unless one is forming.

        Workers that scaling adds join together, once all of them are ready. In a large cluster,
        workers that become ready at different times join together, so that the others serve for
        most of the time (``_JOIN_PAUSE``).
        """
        if not self._cluster.can_accept_operations or self._cluster.round.phase is Phase.FORMING:
            return
        if self._cluster.runs and self._join_at is not None and now < self._join_at:
            return
        self._join_at = None
        members = self._cluster.round.members
        known = {m.name for m in members}
        if self._cluster.unready_workers():
            known |= self._cluster.new_workers
        fresh = [
            r.member
            for r in self._cluster.workers.alive()
            if r.state is WorkerState.READY and r.may_join and r.name not in known
        ]
        if fresh:
            names = listed([m.name for m in fresh])
            verb = "is" if len(fresh) == 1 else "are"
            orders = ", ".join(self._orders_behind(fresh))
            order = f" ({orders})" if orders else ""
            self._go_on([*members, *fresh], f"{names} {verb} ready{order}", now)

    def _orders_behind(self, fresh: Sequence[Member]) -> list[str]:
        """Return ids of the operations that added the workers or drained their predecessors."""
        cluster, scale = self._cluster, self._cluster.scale
        found = []
        if scale is not None and any(m.name in cluster.new_workers for m in fresh):
            found.append(scale.operation.id)
        before = {place_of(r.name): r for r in cluster.workers if r.is_lost}
        left = (before.get(place_of(m.name)) for m in fresh)
        return list(dict.fromkeys([*found, *(r.operation for r in left if r and r.operation)]))

    def loaded(self, name: str, frame: ExpertsLoaded, now: float) -> bool:
        """Handle the reply of worker ``name`` to a command to load experts.

        Returns False if the command was not sent by recovery.
        """
        cluster, reload = self._cluster, self.reloads.answered(name, frame.order)
        if reload is None:
            return False
        if frame.error and reload.epoch == cluster.placement.epoch:
            self._cannot_load(reload, frame.error, now)
            return True
        if not frame.error:
            cluster.moved("recovery", len(reload.fills), frame.num_bytes, now - reload.began_at)
            cluster.round.loaded += reload.fills
        self._run_if_complete(now)  # repeats loads that were rejected because of newer maps
        return True

    def answered(self, name: str, frame: GenerationReady, now: float) -> None:
        """Record that member ``name`` has opened its edges for the forming generation.

        Runs the generation once all members have done so and hold their experts.
        """
        cluster = self._cluster
        if frame.generation == cluster.round.number and cluster.is_forming:
            cluster.round.answers[name] = frame
            self._run_if_complete(now)

    def show_running(self) -> None:
        """Set the state of a running cluster: SERVING if every place is filled, else DEGRADED."""
        is_full = self._cluster.places.is_full(self._cluster.round.members)
        self._cluster.enter(ClusterState.SERVING if is_full else ClusterState.DEGRADED)

    def tick(self, now: float) -> None:
        """Start workers, check time limits, and retry. Called on every controller tick."""
        if not self._cluster.can_accept_operations:
            return
        for reload in self.reloads.take_overdue(now, self._limits.load_limit_s):
            limit = f"no answer within {self._limits.load_limit_s:g} s"
            self._cannot_load(reload, limit, now)
        if self._cluster.round.phase is not Phase.FORMING:
            self._start_workers(now)
        if self._cluster.runs and self._cluster.membership.has_new_groups:
            members = self._cluster.round.members
            self._go_on(members, "attention workers change their step groups", now)
        if self._cluster.round.phase is Phase.STALLED or self._join_at is not None:
            self.ready(now)  # workers may have become ready while forming or waiting
        if self._cluster.round.phase is Phase.STALLED:
            if self._barred and now >= self._retry_at:  # a worker may be able to load now
                self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)
                self._retry_at = now + self._retry_s
                self._barred.clear()
                self._go_on(self._cluster.round.members, "try again to load experts", now)
            self._settle()

    # ---- actions --------------------------------------------------------------------------

    def _go_on(self, members: Sequence[Member], cause: str, now: float) -> None:
        """Form a generation with these members; stall if they cannot run one."""
        cluster = self._cluster
        decision = decide_members(members, self._holdings(members), cluster.round.highest_epoch)
        cluster.membership.experts_complete = decision.experts_complete
        if decision.stage is None:
            cluster.membership.stall(members, now)
            cluster.note(cause, decision.effect, now)
            self._settle()
            cluster.send_snapshot()
            return
        self._failed.clear()
        cluster.form(members, decision.stage.placement, now)
        self._order(decision.stage.fills, members, now)  # workers do not overwrite slots in use
        cluster.note(cause, decision.effect, now)

    def _order(self, loads: Sequence[SlotFill], members: Sequence[Member], now: float) -> None:
        by_device: dict[int, list[SlotFill]] = {}
        for load in loads:
            by_device.setdefault(load.device, []).append(load)
        for member in members:
            if member.holds_experts and (own := by_device.get(member.device)):
                self.reloads.send(member.name, own, now)

    def _run_if_complete(self, now: float) -> None:
        """Run the forming generation once all its experts are in memory.

        Checks the slots, because a load command of an earlier controller may have been lost.
        """
        cluster = self._cluster
        if self.reloads.is_pending or not cluster.is_forming or cluster.round.late():
            return
        if missing := cluster.round.missing(cluster.placement):
            self._order(missing, cluster.round.members, now)
            cause = f"{len(missing)} experts are not in the slots of the placement"
            cluster.note(cause, "load them", now)
            return
        if not cluster.run(now):
            return
        self.show_running()
        cluster.history.runs(cluster.round.number, cluster.round.first_step, now)
        cluster.send_snapshot()
        self._cluster.places.joined(cluster.round.members)
        for member in cluster.round.members:
            cluster.workers[member.name].started_with = None
        if self._lost:  # the first steps after the loss run now
            took_s, lost = now - self._lost_at, sorted(self._lost)
            cluster.metrics.recovered(set(self._lost.values()), took_s)
            opened, self._trace = self._trace, None
            assert opened is not None, "it begins with the first loss"
            cluster.end_trace(opened, took_s, {LOST_WORKERS: lost})
            self._lost.clear()
        self._barred.clear()
        self._retry_s = self._limits.retry_s
        self._join_at = None
        if len(cluster.round.members) > LARGE_CLUSTER:
            pause_s = _JOIN_PAUSE * (now - cluster.round.began_at)
            self._join_at = now + min(pause_s, _MAX_JOIN_PAUSE_S)
        self.ready(now)

    def _settle(self) -> None:
        """Enter the state of a stalled cluster: RECOVERING while workers start, else DEGRADED."""
        are_coming = any(r.is_pending for r in self._cluster.workers)
        is_hopeful = are_coming or self._cluster.places.are_due
        self._cluster.enter(ClusterState.RECOVERING if is_hopeful else ClusterState.DEGRADED)

    def _holdings(self, members: Sequence[Member]) -> ExpertHoldings:
        workers, load = self._cluster.workers, self._cluster.load.totals()
        return ExpertHoldings(
            current=self._cluster.placement,
            desired=self._cluster.desired,
            joining={
                m.device: placement
                for m in members
                if m.holds_experts and (placement := workers[m.name].started_with) is not None
            },
            room=self._cluster.room,
            barred=frozenset(self._barred),
            failed=tuple(self._failed),
            expert_load={key: load.counts(key).tolist() for key in load.prefill},
            is_local=self._cluster.config.workers.mode == "local",
        )

    def _cannot_load(self, reload: ExpertLoadCommand, error: str, now: float) -> None:
        """Handle a member that failed to load experts: other members load them if they can."""
        logger.warning("%s cannot load experts: %s", reload.worker, error)
        self._failed += reload.fills
        self._barred[reload.fills[0].device] = error
        self._retry_at = now + self._retry_s
        cause = f"{reload.worker} cannot load {len(reload.fills)} experts: {error}"
        self._go_on(self._cluster.round.members, cause, now)

    def _start_workers(self, now: float) -> None:
        is_stalled = self._cluster.round.phase is Phase.STALLED
        due = self._cluster.places.take_due(now, is_stalled)
        for member in map(self._cluster.config.workers.with_group, due):
            self._cluster.workers.add(member, now, self._cluster.desired)
            logger.info("start %s", member.name)
            self._cluster.touch()
            holders = expert_holders(
                self._cluster.round.members,
                self._cluster.placement,
                self._cluster.desired,
                member.device,
            )
            self._cluster.effects.append(StartWorker(member, self._cluster.desired, holders))
