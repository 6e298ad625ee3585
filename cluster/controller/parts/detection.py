"""Detection: which workers are lost, judged by the last sign of life of each.

Signs are silence, stalled loops, members that do not answer, starts that take too long,
and reports of peers. ``Detection`` only reports to the controller; it does not act.
"""

from __future__ import annotations

import logging

from cluster.controller.parts.host import ControllerHost
from cluster.controller.parts.settings import ControllerSettings
from cluster.controller.parts.worker_record import WorkerRecord
from cluster.core.frames import PeerLost
from cluster.core.states import ClusterState, WorkerState
from cluster.policy.failure import PeerReport, find_silent

logger = logging.getLogger(__name__)


class Detection:
    """Watches all workers. Owned by the controller; ``now`` is in monotonic seconds."""

    def __init__(self, host: ControllerHost, limits: ControllerSettings, now: float) -> None:
        self._host = host
        self._limits = limits
        self.last_tick = now
        """Time of the last call of ``credit_own_pause``."""

    def peer_lost(self, name: str, frame: PeerLost, now: float) -> None:
        """A worker reports that it lost another. Raises ``ProtocolError`` for a stranger."""
        host = self._host
        suspect = host.workers.find(frame.worker)
        runs = host.is_forming or host.workers[name].state is WorkerState.SERVING
        if suspect.is_lost or frame.generation != host.round.number or not runs:
            return
        logger.warning("%s has lost %s: %s", name, frame.worker, frame.reason)
        host.round.report(
            PeerReport(reporter=name, suspect=frame.worker, reason=frame.reason, at=now)
        )

    def credit_own_pause(self, now: float) -> None:
        """Do not blame workers for a silence in which the controller itself was paused."""
        paused = now - self.last_tick
        if paused > self._limits.detection_limit_s / 2:
            logger.warning("the controller did not run for %.1f s", paused)
            for record in self._host.workers.alive():
                record.credit(paused, now)
        self.last_tick = now

    def tick(self, now: float) -> None:
        """Check all limits."""
        self._check_start(now)
        self._check_silence(now)
        self._check_answers(now)
        self._check_reports(now)

    def _check_start(self, now: float) -> None:
        host, limit = self._host, self._limits.start_limit_s
        if host.state is not ClusterState.STARTING or host.round.number > 0:
            return
        if now - host.round.began_at > limit:
            late = [r for r in host.workers.alive() if r.state is not WorkerState.READY]
            host.lost({r.name: _late_text(r, limit) for r in late}, now)

    def _check_silence(self, now: float) -> None:
        limit = self._limits.detection_limit_s
        early = max(limit, self._limits.start_silence_s)
        starts = self._host.state is ClusterState.STARTING
        for loading, most in ((True, early), (False, early if starts else limit)):
            self._host.lost(find_silent(now, self._host.workers.pulses(loading), most), now)

    def _check_answers(self, now: float) -> None:
        host, limit = self._host, self._limits.generation_limit_s
        if not host.is_forming or now - host.round.began_at <= limit:
            return
        reason = f"did not join generation {host.round.number} within {limit:g} s"
        host.lost(dict.fromkeys(host.round.late(), reason), now)

    def _check_reports(self, now: float) -> None:
        host = self._host
        roles = {r.name: r.member.role for r in host.workers.alive()}
        found = host.round.suspect(now, roles, self._limits.confirm_s)
        if found is not None:
            host.lost({found.suspect: f"{found.reporter} reports: {found.reason}"}, now)


def _late_text(record: WorkerRecord, limit_s: float) -> str:
    return (
        f"not ready within {limit_s:g} s ({record.state.value}, "
        f"{record.loaded_bytes} of {record.total_bytes} bytes)"
    )
