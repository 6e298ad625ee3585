"""Failure detection: decides which workers are lost.

A worker is lost if it is silent, its loop stalls, it does not reply to a generation, its start
takes too long, or peers report it. ``FailureDetector`` only returns lost workers; the controller
acts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping

from cluster.controller.cluster import Cluster
from cluster.controller.membership import Phase
from cluster.controller.settings import ControllerSettings
from cluster.controller.workers import WorkerRecord
from cluster.core.frames import Heartbeat, PeerLost
from cluster.core.states import ClusterState, WorkerState
from cluster.policy.coverage import listed
from cluster.policy.failure import (
    PeerReport,
    confirm_losses,
    find_silent,
    silent_hosts,
)
from cluster.policy.progress import find_late
from cluster.policy.silence import GapWindow

logger = logging.getLogger(__name__)

TICK_S = 0.1
"""Seconds between two ticks of the controller; a tick that is later by this time counts as late."""
_LATE_GAPS = 2.0
"""Silence of a worker, in expected gaps between two signs of life, after which the controller
measures how long the worker waits for a processor."""
_WARY_S = 10.0
"""Seconds after the loss of a worker in which each worker may be silent for the whole detection
limit, because recovery keeps the machine busy."""
_FORMING_S = 0.5
"""Seconds after which the status shows the members for which a forming generation waits."""


class FailureDetector:
    """Detects lost workers. Owned by the controller; ``now`` is in monotonic seconds."""

    def __init__(self, cluster: Cluster, limits: ControllerSettings) -> None:
        self._cluster = cluster
        self._limits = limits
        self.last_tick = self._held_at = cluster.began_at
        """Time of the last tick (``credit_own_pause``); of the last frame of ``_held`` workers."""
        self._is_late, self._woke_at = False, cluster.began_at
        """Whether this tick is late; time of the tick that followed the last long pause.

        The time is infinite at the end of the pause, until the next tick.
        """
        self._gaps: dict[str, GapWindow] = {}
        self._starting: frozenset[str] = frozenset()
        """Hosts on which workers were starting at the last tick; ``""`` is an unknown host."""
        self._held = frozenset[str]()
        """Silent workers that are not declared lost, because most other hosts are silent too."""
        self._ran_at = self._busy_at = cluster.began_at
        """``_ran_at``: last time at which the forming generation did not wait for a new worker.

        ``_busy_at``: last time at which it did not, or also waited for an old member.
        """

    def heard(self, record: WorkerRecord, now: float) -> None:
        """Record that a frame of a worker arrived, and the gap since the worker's last frame.

        The gap is ignored while a worker starts on the same or an unknown host, and for GPU
        workers, whose thread may wait for a step.
        """
        node, alive_s = record.member.node, self._cluster.config.transport.alive_s
        is_remote = node not in ("", self._cluster.host)
        record.gaps = self._gaps.setdefault(node, GapWindow(alive_s, is_remote))
        is_starting = record.is_pending or not self._starting.isdisjoint(("", node))
        tells_nothing = is_starting or str(record.info.get("device")).startswith("cuda")
        if now - self.last_tick <= 2 * TICK_S:  # otherwise the controller may have been paused
            record.gaps.add(math.inf if tells_nothing else now - record.heard_at, now)
        record.heard_at, record.starved_s = now, 0.0

    def suspects(self, now: float) -> dict[str, int]:
        """Return the workers on the controller's host that are late (name -> process id).

        These workers are late with a sign of life or with progress. The caller measures how long
        they waited for a processor and calls ``starved``.
        """
        cluster, transport = self._cluster, self._cluster.config.transport
        return {
            r.name: r.member.pid
            for r in cluster.workers.alive()
            if r.member.pid
            and r.member.node == cluster.host
            and (
                now - r.heard_at > _LATE_GAPS * transport.alive_s
                or now - r.progress_at > self._limits.detection_limit_s / 2
            )
        }

    def starved(self, waits: Mapping[str, float], now: float) -> None:
        """Record for how many seconds workers waited for a processor since the last call.

        The waits do not count as silence, up to ``hold_limit_s`` since the last sign of life.
        """
        for name, seconds in waits.items():
            if name in self._cluster.workers:
                self._cluster.workers[name].starve(seconds, self._limits.hold_limit_s, now)

    def peer_lost(self, name: str, frame: PeerLost, now: float) -> str:
        """Record the report of worker ``name`` that it lost a peer, to be confirmed later.

        If the peer is alive but hangs in a step, returns the reason to form a new generation
        instead; otherwise an empty string. Raises ``ProtocolError`` for an unknown peer.
        """
        cluster, limit = self._cluster, self._limits.detection_limit_s
        suspect = cluster.workers.find(frame.worker)
        runs = cluster.is_forming or cluster.workers[name].state is WorkerState.SERVING
        if suspect.is_lost or frame.generation != cluster.round.number or not runs:
            return ""
        idle_s, since = now - suspect.progress_at, cluster.round.began_at
        if cluster.is_forming and suspect.generation != cluster.round.number:
            is_held_up = now - since > limit and idle_s < self._limits.generation_limit_s
        else:
            is_held_up = frame.is_late and suspect.is_waiting and idle_s > limit
        if is_held_up:
            return f"{name} waits for {frame.worker}, which is in a step that does not end"
        logger.warning("%s has lost %s: %s", name, frame.worker, frame.reason)
        report = PeerReport(reporter=name, suspect=frame.worker, reason=frame.reason, at=now)
        cluster.round.reports.append(report)
        return ""

    def mismatch(self, name: str, frame: Heartbeat, now: float) -> str | None:
        """Return the reason to form a new generation, from the heartbeat of ``name``; else None.

        The reason is that the worker, a member, has run another generation or placement epoch than
        the one in force for longer than ``mismatch_s``.
        """
        cluster, record = self._cluster, self._cluster.workers[name]
        number, epoch, found = cluster.round.number, cluster.placement.epoch, ""
        is_member = cluster.runs and record.state is WorkerState.SERVING
        is_calm = is_member and not cluster.round.reports
        if is_calm and (frame.generation != number or not frame.running):
            found = f"does not run generation {number}"
        elif is_calm and not cluster.membership.may_run(frame.epoch):
            found = f"runs placement epoch {frame.epoch}, not {epoch}"
        if not found:
            record.mismatch = None
        elif record.mismatch is None or record.mismatch[0] != number:
            record.mismatch = number, now
        elif now - record.mismatch[1] > self._limits.mismatch_s:
            return f"{name} {found}"
        return None

    def credit_own_pause(self, now: float) -> None:
        """Exclude a pause of the controller itself from the silence of workers.

        Pending frames are read after a late tick, so no worker is lost before the next tick.
        """
        late_s, was_late = now - self.last_tick - TICK_S, self._is_late
        self._is_late = late_s > TICK_S
        self._woke_at = min(self._woke_at, now)
        if late_s > self._limits.detection_limit_s / 2:
            logger.warning("the controller did not run for %.1f s", late_s)
            self._woke_at = math.inf
        if self._is_late:
            for record in self._cluster.workers.alive():
                record.credit(late_s if was_late else late_s + TICK_S, now)
            self._ran_at, self._busy_at = self._ran_at + late_s, self._busy_at + late_s
        starting = (r for r in self._cluster.workers.alive() if r.is_starting)
        self.last_tick, self._starting = now, frozenset(r.member.node for r in starting)

    def end_hold(self, now: float) -> str:
        """Update the hold, during which silent workers are not declared lost.

        The hold lasts while the controller's own host may cause the silence of workers. At the end
        of the hold, returns the reason to form a new generation, because steps may have stopped;
        otherwise an empty string.
        """
        cluster, limit, before = self._cluster, self._limits.detection_limit_s, self._held
        known = {m.name for m in cluster.round.members} - cluster.round.joins
        pulses = cluster.workers.pulses(False)
        members = [p for p in pulses if p.name in known]
        silent = silent_hosts(now, members, cluster.host, limit)
        silent |= {p.name for p in pulses if silent and now - p.heard_at > limit / 2}
        self._held = frozenset(
            name
            for name in (silent if cluster.can_accept_operations else ())
            if cluster.nodes is None or cluster.workers[name].member.node in cluster.nodes
        )
        if self._held and not before:
            self._held_at = max(cluster.workers[name].heard_at for name in self._held)
            logger.warning("most other hosts are silent: %s", ", ".join(sorted(self._held)))
        silence = now - self._held_at
        if self._held or not before or silent:  # the loss of nodes in Ray's list also ends a hold
            return ""
        for record in cluster.workers.alive():
            record.credit(silence, now)
        if cluster.round.phase is Phase.STALLED or (silence < limit and not cluster.round.reports):
            return ""
        return f"most other hosts were silent for {silence:.1f} s"

    def watch_steps(self, now: float) -> None:
        """Record and log the members for which steps, or a slowly forming generation, wait."""
        cluster = self._cluster
        late: tuple[str, ...] = ()
        if cluster.runs:
            members = (cluster.workers[m.name] for m in cluster.round.members)
            late = find_late(now, [record.step_progress() for record in members])
        elif cluster.is_forming and now - cluster.round.began_at >= _FORMING_S:
            late = tuple(cluster.round.late())
        if late != cluster.late:
            names = listed(late)
            logger.warning("steps wait for %s" if late else "steps continue%s", names)
            cluster.late = late
            cluster.touch()

    def void_reports(self, now: float) -> str:
        """Return the reason to form a new generation after a long pause of the controller.

        The reason is that peers reported losses during the pause, perhaps with the wrong end of an
        edge. Empty without such reports.
        """
        if self._woke_at != now or not self._cluster.round.reports or self._held:
            return ""
        return "reports of peers from a pause of the controller are void"

    def find_lost(self, now: float) -> Iterator[Mapping[str, str]]:
        """Yield workers to declare lost (name -> reason), one limit at a time.

        The state of the cluster is read again for each limit, so that the caller can declare the
        workers lost in between.
        """
        held = frozenset() if now - self._held_at > self._limits.hold_limit_s else self._held
        for lost in self._find_lost(now, held):
            yield {name: reason for name, reason in lost.items() if name not in held}

    def _find_lost(self, now: float, held: frozenset[str]) -> Iterator[Mapping[str, str]]:
        limit, cluster = self._limits.detection_limit_s, self._cluster
        yield self._late_starts(now)
        early = max(limit, self._limits.start_silence_s)
        starts = cluster.state is ClusterState.STARTING
        for loading, most in ((True, early), (False, early if starts else limit)):
            pulses = cluster.workers.pulses(loading)
            is_wary = now - cluster.workers.lost_at < _WARY_S
            yield find_silent(now, pulses, cluster.host, most, is_wary=is_wary)
        if held:  # other workers wait for these, too
            self._ran_at = self._busy_at = now
            return
        yield self._late_answers(now)
        yield self._late_joins(now)
        if self._woke_at <= now:
            yield self._confirmed_reports(now)

    def _late_starts(self, now: float) -> dict[str, str]:
        """Return workers (name -> reason) that are not ready in time after their start.

        Once the cluster has started, the wait of a worker for resources does not count.
        """
        cluster, limit = self._cluster, self._limits.start_limit_s
        if cluster.can_accept_operations:
            known = {m.name for m in cluster.round.members}
            return {
                r.name: f"not ready within {limit:g} s"
                for r in cluster.workers.alive()
                if r.is_starting and r.name not in known and now - r.since > limit
            }
        if cluster.round.number > 0 or now - cluster.round.began_at <= limit:
            return {}
        return {
            r.name: f"not ready within {limit:g} s ({r.state.value}, "
            f"{r.loaded_bytes} of {r.total_bytes} bytes)"
            for r in cluster.workers.alive()
            if r.state is not WorkerState.READY
        }

    def _late_answers(self, now: float) -> dict[str, str]:
        cluster, limit = self._cluster, self._limits.generation_limit_s
        if not cluster.is_forming or now - cluster.round.began_at <= limit:
            return {}
        reason = f"did not join generation {cluster.round.number} within {limit:g} s"
        return dict.fromkeys(cluster.round.late(), reason)

    def _late_joins(self, now: float) -> dict[str, str]:
        """Return new workers (name -> reason) that delay a generation which others have joined."""
        cluster, limit = self._cluster, self._limits.join_limit_s
        late = set(cluster.round.late() if cluster.is_forming else ())
        joins = late & cluster.round.joins
        if not joins:
            self._ran_at = now
        others = (cluster.workers[name] for name in late - joins)
        if not joins or any(r.generation != cluster.round.number for r in others):
            self._busy_at = now
        if now - self._ran_at <= limit or now - self._busy_at <= limit / 4:
            return {}
        return dict.fromkeys(joins, f"kept the other members waiting for {limit:g} s")

    def _confirmed_reports(self, now: float) -> dict[str, str]:
        cluster, alive = self._cluster, self._cluster.workers.alive()
        unheard = now - 2 * cluster.config.transport.alive_s
        unheard = min([unheard, *(report.at for report in cluster.round.reports)])
        return confirm_losses(
            now,
            cluster.round.reports,
            {r.name: r.member for r in alive},
            self._limits.confirm_s,
            silent=[r.name for r in alive if r.heard_at < unheard],
            joins=cluster.round.joins,
            can_spare=self._can_run_without,
        )

    def _can_run_without(self, names: Collection[str]) -> bool:
        """Return whether the members except ``names`` can continue without loading an expert."""
        members, placement = self._cluster.round.members, self._cluster.placement
        devices = frozenset(m.device for m in members if m.name in names and m.holds_experts)
        if devices and placement.without_devices(devices, placement.epoch) is None:
            return False
        return any(m.runs_attention for m in members if m.name not in names)
