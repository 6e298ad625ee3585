"""Reports of a worker to the controller: load progress, heartbeats, status."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.core.frames import ControlFrame, Heartbeat, LoadProgress, StatusReply
from cluster.core.load_report import LoadReport
from cluster.tracing.disks import DiskMonitor
from workers.metrics.activity import Activity
from workers.process.control.membership import Membership

PROGRESS_EVERY_S = 0.2
"""Minimum time between two reports of ``loading``, in seconds."""


@dataclass(kw_only=True, slots=True)
class WorkerReports:
    """Creates the reports of one worker. Control thread only, except ``loading``."""

    membership: Membership
    activity: Activity
    stats: Callable[[], dict[str, float]]
    """Returns gauges and counters by metric name without prefix."""
    load: Callable[[], LoadReport | None]
    """Returns the expert load, or None if this worker does not count it."""
    load_every_s: float
    """Minimum time between two heartbeats with an expert load report, in seconds."""
    send: Callable[[ControlFrame], None]
    disks: DiskMonitor
    """Watches the disks of this host."""
    adapters_in_use: Callable[[], tuple[str, ...]] = tuple
    """Returns the keys of the adapters that requests use."""
    waits_for: Callable[[], tuple[str, ...]] = tuple
    """Returns the names of the peers that the data thread waits for."""
    problems: Callable[[], tuple[str, ...]] = tuple
    """Returns texts about failed components of this worker, for status output."""
    _progress_sent_at: float = 0.0
    _load_sent_at: float = 0.0
    _rows_sent: int = 0

    def loading(self, loaded_bytes: int, total_bytes: int) -> None:
        """Report how much of the weights is loaded: periodically, and at the end. Data thread."""
        self.activity.advance()
        now = time.monotonic()
        if loaded_bytes >= total_bytes or now - self._progress_sent_at >= PROGRESS_EVERY_S:
            self._progress_sent_at = now
            self.send(LoadProgress(loaded_bytes=loaded_bytes, total_bytes=total_bytes))

    def heartbeat(self) -> Heartbeat:
        """The next heartbeat: state of the data thread, metrics, and the load report if due."""
        membership, activity = self.membership, self.activity
        now = time.monotonic()
        due = now - self._load_sent_at >= self.load_every_s
        epoch = float(membership.epochs.current.epoch)
        return Heartbeat(
            progress=activity.observe(now),
            idle=activity.is_idle,
            generation=membership.generation.number,
            running=membership.is_running,
            epoch=membership.epochs.current.epoch,
            waiting=activity.is_waiting,
            stalled_s=activity.stalled_s,
            waits_for=self.waits_for(),
            fenced=membership.is_fenced,
            stats={**self.stats(), "placement_epoch": epoch},
            expert_load=self._new_load() if due else None,
            low_disks=self.disks.low(now),
            adapters=self.adapters_in_use(),
            problems=self.problems(),
        )

    def status(self) -> StatusReply:
        """Reply to a status request of the controller."""
        return StatusReply(token=0, stats=self.stats(), expert_load=self.load())

    def _new_load(self) -> LoadReport | None:
        """The expert load report, or None if it is unchanged since the last one sent."""
        self._load_sent_at = time.monotonic()
        report = self.load()
        if report is None or report.rows == self._rows_sent:
            return None
        self._rows_sent = report.rows
        return report
