"""Reports of a worker to the controller: progress of loading, heartbeats, status."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.core.frames import ControlFrame, Heartbeat, LoadProgress, StatusReply
from cluster.core.load_report import LoadReport
from workers.metrics.activity import Activity
from workers.process.membership import Membership

PROGRESS_EVERY_S = 0.2
"""Least time between two reports of loading progress."""


class WorkerReports:
    """Makes the reports of one worker. Control thread, but for ``loading``.

    Args:
        membership: names the generation and the epoch.
        activity: of the data thread.
        stats: gauges and counters by metric name without prefix.
        load: counted load of the experts; None where this worker counts none.
        load_every_s: least time between two heartbeats with a load report.
        send: sends a frame to the controller.
    """

    def __init__(
        self,
        membership: Membership,
        activity: Activity,
        *,
        stats: Callable[[], dict[str, float]],
        load: Callable[[], LoadReport | None],
        load_every_s: float,
        send: Callable[[ControlFrame], None],
    ) -> None:
        self._membership = membership
        self._activity = activity
        self._stats = stats
        self._load = load
        self._load_every_s = load_every_s
        self._send = send
        self._progress_sent_at = 0.0
        self._load_sent_at = 0.0
        self._rows_sent = 0

    def loading(self, loaded_bytes: int, total_bytes: int) -> None:
        """Report the progress of loading, now and then and at the end. Data thread."""
        self._activity.advance()
        now = time.monotonic()
        if loaded_bytes >= total_bytes or now - self._progress_sent_at >= PROGRESS_EVERY_S:
            self._progress_sent_at = now
            self._send(LoadProgress(loaded_bytes=loaded_bytes, total_bytes=total_bytes))

    def heartbeat(self) -> Heartbeat:
        """State of the data thread, statistics, and the load report when it is due."""
        membership, activity = self._membership, self._activity
        due = time.monotonic() - self._load_sent_at >= self._load_every_s
        epoch = float(membership.epochs.current.epoch)
        return Heartbeat(
            progress=activity.progress,
            idle=activity.is_idle,
            generation=membership.generation.number,
            waiting=activity.is_waiting,
            fenced=membership.is_fenced,
            stats={**self._stats(), "placement_epoch": epoch},
            expert_load=self._new_load() if due else None,
        )

    def status(self) -> StatusReply:
        """Answer to a question of the controller."""
        return StatusReply(token=0, stats=self._stats(), expert_load=self._load())

    def _new_load(self) -> LoadReport | None:
        """The load report if it has changed since the last one sent."""
        self._load_sent_at = time.monotonic()
        report = self._load()
        if report is None or report.rows == self._rows_sent:
            return None
        self._rows_sent = report.rows
        return report
