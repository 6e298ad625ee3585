"""Draining: workers hand over their requests and experts, leave the generation and end.

No request fails. A client drains a worker or a node, a worker requests a drain when it receives
SIGTERM, and a scaling drains the workers that it removes. A restarted controller continues the
drain of an earlier one (``ControllerMemory``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from cluster.controller.cluster import Cluster
from cluster.controller.drain_operation import Drain, DrainCommand, DrainStep
from cluster.controller.drain_removal import stage_without
from cluster.controller.drain_requests import DrainRequests
from cluster.controller.operation_start import start_operation
from cluster.controller.operations import Operation
from cluster.controller.rebalancing import Rebalancing
from cluster.controller.running_drain import RunningDrain
from cluster.core.errors import ConflictError, UnknownNameError
from cluster.core.frames import ControlFrame

SIGNAL_LIMIT_S = 120.0
"""Time limit, in seconds, of a drain that a worker requests after SIGTERM."""


class Draining:
    """Decides which workers are drained next, one drain at a time. Owned by the controller."""

    def __init__(self, cluster: Cluster, rebalancing: Rebalancing) -> None:
        """A drain waits until ``rebalancing`` has abandoned or ended its change."""
        self._cluster = cluster
        self._rebalancing = rebalancing
        self._requests = DrainRequests(follow_nodes=cluster.config.workers.follow_nodes)
        self._newest: RunningDrain | None = None
        self._refusal = ""

    @property
    def _running(self) -> RunningDrain | None:
        return None if self._newest is None or self._newest.is_over else self._newest

    def restore(self, drain: Drain, now: float) -> None:
        """Continue the drain of an earlier controller, after the worker table is restored."""
        drain.restore(self._cluster.operations, now)
        self._run(drain).restore(now)

    def begin(self, command: DrainCommand, now: float) -> Operation:
        """Begin a drain, or return the operation that a command with the same id has begun.

        Raises ``UnknownNameError`` and ``ConflictError``; the cluster is unchanged in that case.
        """
        return start_operation(command, self, self._cluster, now)

    def target(self, command: DrainCommand) -> str:
        """Return the names of the workers to drain, as one text (``OperationKind.target``)."""
        return " and ".join(self._named(command))

    def prepare(self, command: DrainCommand) -> Callable[[Operation, float], None]:
        """Check a drain command; return its first step (``OperationKind.prepare``)."""
        names = self._named(command)
        stage_without(names, self._cluster)
        removes_places = self._requests.remove_places(names, command.node)
        return partial(self._start, names, command, removes_places)

    def remove(
        self, names: Sequence[str], operation: Operation, limit_s: float, now: float
    ) -> None:
        """Drain workers and remove their places, as the last part of a running scale operation."""
        self._start(tuple(names), DrainCommand(limit_s=limit_s), True, operation, now)

    def requested(self, name: str, now: float, *, node_leaves: bool = False) -> None:
        """Handle the request of worker ``name`` to be drained, after SIGTERM.

        With ``node_leaves``, Ray reports that the worker's node will leave; called repeatedly.
        """
        running = self._running
        if running is None or name not in running.record.names or node_leaves:
            self._requests.add(name, now, node_leaves=node_leaves)

    def cancel(self, operation: Operation, now: float) -> None:
        """Roll back the drain of ``operation``. Raises ``ConflictError`` if it is too late."""
        running = self._running
        if running is None or running.record.operation is not operation:
            raise ConflictError(f"{operation.id} has ended")
        running.cancel(now)

    # ---- events ---------------------------------------------------------------------------

    def frame(self, name: str, frame: ControlFrame, now: float) -> bool:
        """Handle a worker's frame about a placement change.

        Returns False if no drain is changing the placement.
        """
        return (running := self._running) is not None and running.frame(name, frame, now)

    def lost(self, reasons: Mapping[str, str], now: float) -> None:
        """Handle lost workers (name -> reason), which the worker table has already recorded."""
        if (running := self._running) is not None:
            running.lost(reasons, now)

    def ended(self, names: Sequence[str], now: float) -> None:
        """Handle the end of the processes of the workers ``names``."""
        if (running := self._running) is not None:
            running.ended(names, now)

    def tick(self, now: float) -> None:
        """Begin the drain that workers requested, or advance the running drain."""
        if self._running is None:
            self._begin_requested(now)
        if (running := self._running) is not None:
            running.tick(now)

    # ---- which workers ----------------------------------------------------------------------

    def _begin_requested(self, now: float) -> None:
        """Begin the next drain that workers requested, if no operation runs."""
        if self._cluster.operations.running is not None or not self._cluster.runs:
            return
        if not self._requests.are_due(now):
            return
        names = self._requests.take({r.name for r in self._cluster.workers.alive()})
        if not names:
            return
        ready = tuple(name for name in names if self._cluster.workers[name].is_ready)
        if ready:  # workers that are not ready are drained later
            self._requests.pause(set(names) - set(ready), now)
            names = ready
        try:
            self.begin(DrainCommand(requested_by=names, limit_s=SIGNAL_LIMIT_S), now)
        except ConflictError as err:
            self._requests.pause(names, now)
            cause, effect = f"{' and '.join(names)} got a signal to end", f"continue: {err}"
            if self._refusal != cause + effect:
                self._cluster.note(cause, effect, now)
            self._refusal = cause + effect

    def _start(
        self,
        names: tuple[str, ...],
        command: DrainCommand,
        removes_places: bool,
        operation: Operation,
        now: float,
    ) -> None:
        drain = Drain(
            operation=operation,
            names=names,
            command=command,
            deadline=now + command.limit_s,
            left_s=command.limit_s,
            removes_places=removes_places,
        )
        drain.resume(DrainStep.SETTLE)
        running = self._run(drain)
        self._cluster.send_snapshot()
        running.advance(now)

    def _run(self, drain: Drain) -> RunningDrain:
        self._newest = RunningDrain(drain, self._cluster, self._rebalancing, self._requests)
        return self._newest

    def _named(self, command: DrainCommand) -> tuple[str, ...]:
        """Find the workers that a command names. Raises ``UnknownNameError``, ``ConflictError``."""
        workers = self._cluster.workers
        if command.requested_by:
            return command.requested_by
        if command.worker:
            if command.worker not in workers:
                raise UnknownNameError(f"there is no worker {command.worker[:64]!r}")
            return (command.worker,)
        on_node = [r for r in workers if r.member.node == command.node]
        if not on_node:
            raise UnknownNameError(f"there is no worker on a node {command.node[:64]!r}")
        names = tuple(r.name for r in on_node if not r.is_lost)
        if not names:
            raise ConflictError(f"no worker is left on {command.node}")
        return names
