"""The steps of an attention worker, in the step protocol of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.core.errors import PeerLostError, TransportError
from workers.engine.engine import Engine
from workers.engine.step_watchdog import StepWatchdog
from workers.kv.transfer.fetch_cost import FetchCost
from workers.metrics.step_timer import StepTimer
from workers.process.context import WorkerContext
from workers.process.data_plane import IDLE_WAIT_S
from workers.process.engine_server import EngineServer
from workers.requests.request import TokenOutput
from workers.requests.step_header import StepHeader
from workers.scheduling.step_plan import RowsWanted
from workers.transport.path_watch import LOOK_S

_MEASURED_ROWS = 32
"""Minimum number of prompt rows for which the time of a step measures the prefill speed."""
_COMMIT_SHARE = 0.25
"""An idle leader runs an empty step after this fraction of the lease without a renewal."""


class EngineSteps:
    """Decides when this rank proposes a step, how long it waits, and when a step is overdue."""

    def __init__(
        self,
        context: WorkerContext,
        engine: Engine,
        stream: EngineServer,
        timer: StepTimer,
        wait_s: Callable[[float], float],
        cost: Callable[[], FetchCost],
    ) -> None:
        """``wait_s`` shortens a wait for a step, so that it ends when other work is due. ``cost``
        returns the object that learns the prefill speed.
        """
        self._context = context
        self._engine = engine
        self._stream = stream
        self._timer = timer
        self._wait_s = wait_s
        self._cost = cost
        self._watchdog = StepWatchdog(context.config.transport.detection_limit_s)
        self._has_more = False
        """Whether the engine still had work after the last step."""
        self._was_unread = False
        """Whether the last step began before the step before it was read."""

    def begin(self) -> None:
        """Reset the watchdog at the start of a generation."""
        self._watchdog.begin()

    def run(self, emit: Callable[[list[TokenOutput]], None]) -> None:
        """Wait for a step and run it; return without one if the thread is woken.

        ``emit`` gets the outputs. They are sent while the next step computes, if one follows.
        Raises ``TransportError``.
        """
        try:
            self._run_next(emit)
        except TransportError:
            self._stream.release()
            self._engine.settle()
            raise
        if not self._has_more:
            self._stream.release()

    def _run_next(self, emit: Callable[[list[TokenOutput]], None]) -> None:
        engine, channel, activity = self._engine, self._context.channel, self._context.activity
        membership = self._context.membership
        rows = engine.rows_wanted()
        if outputs := engine.requests.take_outputs():  # of a step that was read only now
            emit(outputs)
        activity.is_idle = not engine.has_work
        activity.wants_rows = rows.decode_rows + rows.prefill_rows > 0
        is_timed = self._was_unread == engine.steps.is_unread
        channel.propose(rows, even_empty=self._needs_commit(), is_timed=is_timed)
        if not channel.has_header:
            self._stream.release()
        header = channel.wait(self._wait_s(self._idle_s()))
        if channel.is_settled:
            membership.confirm_commit()
        if header is None:
            self._check_overdue(rows)
            return
        activity.is_idle = False
        activity.rows = header.decode_rows + header.prefill_rows
        stall_s = time.monotonic() - membership.last_commit if self._has_more else 0.0
        membership.follow_epoch(header, stall_s)
        self._has_more, self._was_unread = False, engine.steps.is_unread
        outputs = self._step(header)
        is_shared = bool(activity.rows or header.bucket) or not channel.is_leader
        membership.record_commit(is_shared=is_shared and engine.steps.has_ended)
        activity.advance()
        self._has_more = engine.has_work
        self._stream.release()  # a step without rows has not computed
        self._stream.hold()
        emit(outputs)

    def _step(self, header: StepHeader) -> list[TokenOutput]:
        begin = time.monotonic()
        outputs = self._engine.step(header)
        if (rows := header.grant(self._context.member.rank).prefill_rows) >= _MEASURED_ROWS:
            self._cost().observe_prefill(rows, time.monotonic() - begin)
        self._timer.end_step("sample")
        return outputs

    def _check_overdue(self, rows: RowsWanted) -> None:
        """Raise ``PeerLostError`` if no step has started for too long for the rows of this rank, or
        of one below it in the tree."""
        channel = self._context.channel
        waited_s = self._watchdog.overdue_s(
            wants=rows.decode_rows + rows.prefill_rows > 0 or channel.is_wanted,
            depth=channel.depth,
            last_rows=channel.last_rows,
            last_commit=self._context.membership.last_commit,
            now=time.monotonic(),
        )
        missing = channel.missing_workers()
        if waited_s is None or not missing:
            return
        reason = f"no step for {waited_s:.1f} s, waiting for {', '.join(missing)}"
        raise PeerLostError(missing[0], reason, is_late=True)

    def _idle_s(self) -> float:
        """Longest wait for a header, in seconds.

        It is short after an empty step, until the leader knows that all ranks got the header.
        """
        membership, channel = self._context.membership, self._context.channel
        if membership.last_shared_commit < membership.last_commit or channel.awaits_settling:
            return LOOK_S
        return min(IDLE_WAIT_S, self._context.config.transport.lease_s * _COMMIT_SHARE)

    def _needs_commit(self) -> bool:
        """Whether an empty step must renew all leases, because the controller is silent, and the
        one before has arrived everywhere."""
        membership = self._context.membership
        if membership.last_shared_commit < membership.last_commit:
            return False
        known = max(self._context.contact_at(), membership.last_commit)
        return time.monotonic() - known > self._context.config.transport.lease_s * _COMMIT_SHARE
