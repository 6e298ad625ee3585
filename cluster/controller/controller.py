"""The controller's state machine, which turns events into effects without Ray, sockets or a clock.

The parts of the controller share one model (``Cluster``): each handles the events of its subject,
changes the model and adds effects to it. Every method is called from one thread; ``now`` is in
monotonic seconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

from cluster.controller.adapters import Adapters
from cluster.controller.autoscale import Autoscaling
from cluster.controller.cluster import Cluster
from cluster.controller.commands import Commands
from cluster.controller.documents import SHARED_S, is_large_cluster
from cluster.controller.draining import Draining
from cluster.controller.effects import EndAllWorkers, EndWorkers
from cluster.controller.failover import CollectedState, continue_with
from cluster.controller.failure_detector import FailureDetector
from cluster.controller.host_disks import describe_low, differ
from cluster.controller.node_follower import NodeFollower
from cluster.controller.rebalancing import Rebalancing
from cluster.controller.recovery import Recovery
from cluster.controller.scale import Scaling
from cluster.controller.settings import ControllerSettings
from cluster.controller.start_times import StartTimes
from cluster.controller.workers import WorkerRecord
from cluster.core import frames
from cluster.core.errors import ProtocolError
from cluster.core.states import ClusterState, WorkerState
from cluster.policy.coverage import describe_members, listed
from cluster.policy.progress import STEPS_WAIT

logger = logging.getLogger(__name__)

PROGRESS_S = 0.1
"""Shortest time between two versions of the state that differ only in the progress of starts.

Without it, a caller that waits for changes gets the state of all workers for each progress report
of each worker.
"""
CALL_AGAIN_S = 0.2
"""Seconds in which a worker must reconnect after its control connection closed; else it is lost."""


class Controller:
    """Passes events (frames, losses, ticks) to the parts of the controller, which share a model.

    The model is one ``Cluster``. ``now`` is in monotonic seconds.
    """

    def __init__(self, cluster: Cluster, settings: ControllerSettings, executor: Executor) -> None:
        """``executor`` runs the computations that plan a rebalancing."""
        self.cluster = cluster
        self.detection = FailureDetector(self.cluster, settings)
        self.recovery = Recovery(self.cluster, settings)
        self.rebalancing = Rebalancing(self.cluster, executor)
        self.draining = Draining(self.cluster, self.rebalancing)
        self.scaling = Scaling(self.cluster, self.rebalancing, self.draining)
        self.autoscaling = Autoscaling(self.cluster, self.scaling)
        self.following = NodeFollower(self.cluster, self.scaling)
        self.adapters = Adapters(self.cluster)
        self._start_times = StartTimes(cluster.began_at)
        self._requested_at = -math.inf
        self._progress_version = 0  # version of the state before the newest progress of a start
        self._progress_at = -math.inf
        self.commands = Commands(
            cluster=self.cluster,
            draining=self.draining,
            scaling=self.scaling,
            rebalancing=self.rebalancing,
            adapters=self.adapters,
        )

    # ---- events ---------------------------------------------------------------------------

    def frame(self, name: str, frame: frames.ControlFrame, now: float) -> None:
        """Handle a frame (control message) from worker ``name``.

        Raises ``ProtocolError`` for an unexpected frame or an unknown worker.
        """
        cluster = self.cluster
        record = cluster.workers.find(name)
        if record.is_lost or not cluster.is_up:
            cluster.send(frames.Shutdown(reason=record.reason or "the cluster is ending"), name)
            return
        self.detection.heard(record, now)
        if cluster.state is ClusterState.STARTING:
            self._start_times.take(name, frame, now)
        record.disconnected = ""  # it has connected again
        match frame:
            case frames.Heartbeat():
                is_same = record.problems == frame.problems
                if differ(record.low_disks, frame.low_disks) or not is_same:
                    cluster.touch()
                record.beat(frame, now)
                cluster.load.take(name, frame.expert_load)
                term, identity = cluster.term, cluster.identity
                ack = frames.HeartbeatAck(term=term, controller=identity, number=frame.number)
                cluster.send(ack, name)
                is_member = record.state is WorkerState.SERVING
                if frame.fenced and frame.generation == cluster.round.number and is_member:
                    # the worker stopped serving while this controller was down
                    cluster.reform(f"the lease of {name} ran out", now)
                elif (cause := self.detection.mismatch(name, frame, now)) is not None:
                    cluster.reform(cause, now)
            case frames.Alive():
                pass
            case frames.SnapshotKept():
                record.kept_version = frame.version
            case frames.StatusReply():
                cluster.load.take(name, frame.expert_load)
                record.take_numbers(frame)
            case frames.Register():
                record.register(frame)
                record.since = now
                self._progress_version = cluster.version
                if why := cluster.workers.incompatibility(name, cluster.generation):
                    self.lost({name: why}, now)
                else:
                    self.adapters.registered(record)
            case frames.LoadProgress():
                record.load(frame)
                self._progress_version = cluster.version
            case frames.WorkerReady():
                record.ready(frame)
                self._worker_ready(record, now)
            case frames.WorkerFailed():
                self.lost({name: frame.reason}, now)
            case frames.PeerLost():
                if cause := self.detection.peer_lost(name, frame, now):
                    cluster.reform(cause, now)
                self._lose_disconnected(now)
            case frames.GenerationReady():
                self.recovery.answered(name, frame, now)
            case frames.ExpertsLoaded() if self.recovery.loaded(name, frame, now):
                pass  # the recovery commanded this load
            case frames.ExpertsLoaded() | frames.EpochReady() | frames.EpochSwitched():
                if not self.draining.frame(name, frame, now):
                    self.rebalancing.frame(name, frame, now)
            case frames.AdaptersKept():
                self._adapters_kept(record, frame, now)
            case frames.DrainRequest():
                self.draining.requested(name, now)
            case frames.WorkerReport() if frame.generation is None:
                pass  # its first connection broke before it had registered
            case _:
                raise ProtocolError(f"{name} sent {type(frame).__name__}")

    def disconnected(self, name: str, reason: str, is_invalid: bool, now: float) -> None:
        """Handle the close of a worker's control connection.

        ``is_invalid``: whether the worker sent an invalid frame. If so, the worker is lost at once;
        if not, it is lost unless it reconnects within ``CALL_AGAIN_S``.
        """
        if name in self.cluster.workers:
            record = self.cluster.workers[name]
            record.disconnected = reason
            record.call_again_by = now if is_invalid else now + CALL_AGAIN_S
            self._lose_disconnected(now)

    def _lose_disconnected(self, now: float) -> None:
        """Declare disconnected workers lost if a peer reported them or they reconnect too late."""
        reported = {report.suspect for report in self.cluster.round.reports}
        gone = {
            r.name: f"its control connection closed ({r.disconnected})"
            for r in self.cluster.workers.alive()
            if r.disconnected and (now >= r.call_again_by or r.name in reported)
        }
        self.lost(gone, now)

    def created(self, name: str, now: float) -> None:
        """Record that the process of a new worker runs; the worker's start limit begins now."""
        if not (record := self.cluster.workers.find(name)).has_process:
            record.has_process, record.since = True, now

    def lost(self, reasons: Mapping[str, str], now: float) -> None:
        """Declare workers (name -> reason) lost, and recover; during the start, the start fails.

        Workers that are already lost are ignored.
        """
        cluster = self.cluster
        if not (fresh := cluster.workers.lose(reasons, now)):
            return
        for name, reason in fresh.items():
            logger.warning("lost %s: %s", name, reason)
            cluster.round.drop_reports(name)
        cluster.send_snapshot()  # before any generation without them
        if cluster.state is ClusterState.STARTING:
            self.fail_start(listed([f"{n}: {r}" for n, r in fresh.items()], "; "), now)
        elif cluster.is_up:
            for name, reason in fresh.items():
                cluster.send(frames.Shutdown(reason=f"declared lost: {reason}"), name)
            if cluster.drain is not None:
                self.draining.lost(fresh, now)
            if cluster.scale is not None:
                self.scaling.lost(cluster.scale, fresh)
            self.recovery.lost(fresh, now)
            cluster.effects.append(EndWorkers(tuple(fresh)))

    def fail_start(self, error: str, now: float) -> None:
        """End all workers and record ``error``; no effect once the cluster's start is complete."""
        if self.cluster.state is ClusterState.STARTING:
            self.cluster.error = error
            self.stop(now, f"the start failed: {error}")

    def tick(self, now: float) -> None:
        """Check all time limits of the controller. Called several times a second."""
        self.detection.credit_own_pause(now)
        if self._progress_version == self.cluster.version and now - self._progress_at >= PROGRESS_S:
            self._progress_at = now
            self.cluster.touch()
        self.draining.tick(now)
        if self.cluster.scale is not None:
            self.lost(self.scaling.tick(self.cluster.scale, now), now)
            if self.cluster.runs:
                self.recovery.show_running()  # empty places may have been removed
        if not self.cluster.is_up:
            return
        self.cluster.load.tick(now)
        self.rebalancing.tick(now)
        if cause := self.detection.end_hold(now) or self.detection.void_reports(now):
            self.cluster.reform(cause, now)
        self._lose_disconnected(now)
        for lost in self.detection.find_lost(now):
            self.lost(lost, now)
        self.detection.watch_steps(now)
        self.lost(self.adapters.tick(now), now)
        self.recovery.tick(now)
        self.autoscaling.tick(now)
        self.cluster.workers.forget(now)
        self.cluster.load.forget({r.name for r in self.cluster.workers.alive()})

    def stop(self, now: float, reason: str = "stopped") -> None:
        """End every worker. The cluster's state is STOPPED once all worker processes have ended."""
        if not self.cluster.is_up:
            return
        self.cluster.enter(ClusterState.DRAINING)
        self.cluster.history.add(self.cluster.round.number, now, reason, "end all workers")
        alive = self.cluster.workers.alive()
        self.cluster.send(frames.Shutdown(reason=reason), *(r.name for r in alive))
        self.cluster.effects.append(EndAllWorkers())

    def all_ended(self, now: float) -> None:
        """Record that every worker process has ended."""
        for record in self.cluster.workers.alive():
            record.enter(WorkerState.LOST, "ended")
        if self.cluster.state is ClusterState.DRAINING:
            self.cluster.enter(ClusterState.STOPPED)

    # ---- queries --------------------------------------------------------------------------

    def request_status(self, now: float) -> None:
        """Request new stats from all registered workers, and the expert load of attention workers.

        ``cluster.workers.status_complete`` is true once all of them have replied. In a large
        cluster, nothing is requested within ``SHARED_S`` of the last request, and expert load only
        comes with heartbeats.
        """
        is_large = is_large_cluster(self.cluster)
        if not self.cluster.is_up or (is_large and now - self._requested_at < SHARED_S):
            return
        self._requested_at = now
        number = next(self.cluster.order_numbers)
        request = frames.StatusRequest(token=number, has_load=not is_large)
        asked = [r for r in self.cluster.workers.alive() if r.state is not WorkerState.STARTING]
        for record in asked:
            record.pending_status_token = request.token
        self.cluster.send(request, *(r.name for r in asked))

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the cluster as JSON-compatible data, for ``status --json``."""
        cluster, workers = self.cluster, self.cluster.config.workers
        return {
            "version": cluster.version,
            "schema": 1,
            "state": cluster.state.value,
            "error": cluster.error,
            "mode": workers.mode,
            "mode_reason": workers.mode_reason,
            "term": cluster.term,
            "generation": cluster.round.number,
            "placement_epoch": cluster.placement.epoch,
            "experts_complete": cluster.membership.experts_complete,
            "late_workers": list(cluster.late),
            "start": self._start_times.to_list(),
            "results": cluster.generation.agreement.to_dict(),
            "model": dict(cluster.workers.model),
            "rebalance": self.rebalancing.to_dict(),
            "autoscale": self.autoscaling.to_dict(),
            "adapters": cluster.adapters.to_list(),
            "workers": [r.to_dict(cluster.num_slots) for r in cluster.workers],
            "problems": [
                *([f"{STEPS_WAIT} {listed(cluster.late)}"] if cluster.late else ()),
                *self.recovery.problems(self.detection.last_tick),
                *describe_low(
                    [
                        *cluster.disks.reported(),
                        *((r.member.node, d) for r in cluster.workers.alive() for d in r.low_disks),
                    ]
                ),
                *(problem for r in cluster.workers.alive() for problem in r.problems),
                *self.adapters.problems(),
            ],
            "metrics": cluster.metrics.to_plain(),
            "history": cluster.history.to_list(),
            "changes": cluster.traces.to_list(),
        }

    def restore(self, collected: CollectedState, now: float) -> None:
        """Restore a restarted controller from ``collected``, the reports of the running workers.

        Must be the first call.
        """
        self.cluster.state = ClusterState.RECOVERING
        parts = (self.recovery, self.draining, self.scaling, self.adapters)
        continue_with(collected, self.cluster, *parts, now)

    def _worker_ready(self, record: WorkerRecord, now: float) -> None:
        cluster = self.cluster
        cluster.touch()
        cluster.workers.learn_model(record)
        self._may_join(now)

    def _adapters_kept(self, record: WorkerRecord, frame: frames.AdaptersKept, now: float) -> None:
        error = self.adapters.answered(record, frame, now)
        if error and self.cluster.state is ClusterState.STARTING:
            self.lost({record.name: error}, now)
        else:
            self._may_join(now)

    def _may_join(self, now: float) -> None:
        """Form the first generation once all workers are ready.

        After the first generation, let ``Recovery`` add workers that have become ready.
        """
        cluster = self.cluster
        if cluster.state is not ClusterState.STARTING:
            self.recovery.ready(now)
        elif all(r.state is WorkerState.READY and r.may_join for r in cluster.workers):
            members = tuple(r.member for r in cluster.workers)
            cluster.history.add(1, now, "start", f"serve with {describe_members(members)}")
            cluster.send_snapshot()  # a restarted controller may continue this generation
            cluster.form(members, cluster.placement, now)
