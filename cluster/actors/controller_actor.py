"""The controller as a Ray actor, with the methods that launchers, gateways and commands call.

``ControllerRunner`` runs the controller. If Ray has restarted the actor, the workers of the
previous controller keep serving. The actor first collects their state; calls wait for that.
"""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.actors.controller_runner import ControllerRunner
from cluster.actors.handoff import Handoff
from cluster.actors.tasks import Background
from cluster.config.cluster import ClusterConfig
from cluster.controller.cluster import Cluster
from cluster.controller.controller import Controller
from cluster.controller.documents import load_document, placement_document, snapshot_before_start
from cluster.core.errors import (
    ConflictError,
    NotReadyError,
    StartError,
)
from cluster.core.frames import LowDisk
from cluster.core.release import RELEASE
from cluster.core.states import ClusterState
from cluster.core.watchdog import BEAT_S, start_watchdog
from cluster.sizing.start_plan import plan_start
from cluster.tracing import logs
from cluster.tracing.gateway_counts import GatewayRecord

if TYPE_CHECKING:
    from cluster.actors.worker_group import WorkerGroup  # imports Ray

logger = logging.getLogger(__name__)

STATUS_LIMIT_S = 1.0
"""Longest wait for the current stats of the workers."""
_STOP_LIMIT_S = 20.0
_KEEP_LIMIT_S = 5.0
"""Longest wait until a worker has stored the state that a command has changed."""


class ControllerActor:
    """Async Ray actor that starts at most one cluster; see ``cluster.actors.controller_client``."""

    def __init__(
        self,
        group: WorkerGroup,
        status_limit_s: float = STATUS_LIMIT_S,
        *,
        has_process: bool = False,
    ) -> None:
        """``has_process``: the actor runs in a process of its own. It sets up logging there, and a
        watchdog kills the process if its event loop hangs.
        """
        self._group = group
        self._status_limit_s = status_limit_s
        self._background = Background()
        self._has_process = self._wants_watchdog = has_process
        self._set_up_log()
        self.runner = ControllerRunner(group, self._background)
        self._gateways = self.runner.gateways
        self._starting = asyncio.Lock()
        self._handoff = Handoff(self.runner, self._set_up_log)

    async def start(
        self,
        config: dict[str, Any],
        banks: list[dict[str, Any]],
        profile: dict[str, Any] | None = None,
        asked: dict[str, str] | None = None,
        free_cpus: float | None = None,
    ) -> None:
        """Begin to start all workers. Wait for the result with ``wait_snapshot``.

        ``banks``: dicts with ``bank``, ``layer`` and ``num_experts``. ``profile``: load profile for
        predictions. ``asked``: data that ``origin`` returns. ``free_cpus``: number of CPUs that
        other users of Ray left free before this start, None without other users. A second call does
        nothing. If the start cannot begin, everything is released, and ``ConfigError`` or
        ``StartError`` is raised.
        """
        await self.restore()
        if self._handoff.is_pending:
            raise StartError("controller", self.runner.failure)
        async with self._starting:
            if self.runner.controller is None:
                nodes = await asyncio.to_thread(self._group.resources)
                known = ClusterConfig.from_dict(config)
                self._set_up_log(known.observability.log_format)
                plan = plan_start(known, banks, nodes, free_cpus, profile)
                assert plan.load is not None, "the workers do not run yet"
                notes = {"profile": profile, "top_k": plan.load.top_k, "asked": asked}
                await self.runner.start(plan, notes)

    async def restore(self) -> None:
        """Continue the cluster of an earlier controller, if there was one.

        Returns after success, or after the first failure, while retries continue. A restarted actor
        calls this method itself, and all other calls wait for it.
        """
        if self._wants_watchdog:
            self._wants_watchdog = False
            self._background.spawn(_beat())
        await self._handoff.settle()

    async def origin(self) -> dict[str, Any]:
        """Return ``asked`` and ``config`` (with the token) with which the cluster was started.

        Both are None before a start. Raises ``NotReadyError`` while the workers of an earlier
        controller cannot be reached.
        """
        await self.restore()
        if self._handoff.is_pending:
            raise NotReadyError(self.runner.failure)
        async with self._starting:
            controller, plan = self.runner.controller, self.runner.plan
        if controller is None or plan is None:
            return {"asked": None, "config": None}
        return {"asked": controller.cluster.notes.get("asked"), "config": plan.config.to_dict()}

    async def snapshot(self, fresh: bool = False) -> dict[str, Any]:
        """Return the state of the cluster. ``fresh``: request current stats of workers first."""
        await (self._fresh_cluster() if fresh else self.restore())
        return self._snapshot()

    async def wait_snapshot(
        self,
        known_version: int,
        timeout_s: float,
        gateway: str = "",
        host: str = "",
        low_disks: tuple[LowDisk, ...] = (),
        adapters: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Return the state once its version differs from ``known_version``, or after ``timeout_s``.

        ``gateway``: name of the caller if it is a gateway, which then calls again immediately.
        ``low_disks``: folders on nearly full disks of its host. ``adapters``: keys of the adapters
        that its requests use.
        """
        await self.restore()
        if gateway:
            self._gateways.asks(gateway, known_version, host, low_disks, adapters)
        try:
            await self._background.wait(lambda: self._version() != known_version, timeout_s)
        finally:
            self._gateways.answered(gateway)
        return self._snapshot()

    async def gateway_leaves(self, gateway: str) -> None:
        """Remove a gateway that shuts down normally."""
        self._gateways.leaves(gateway)

    async def exchange_counts(
        self, records: dict[str, GatewayRecord], times: dict[str, float]
    ) -> dict[str, Any]:
        """Store a gateway's counts, and return other gateways' counts; see ``GatewayCounts``."""
        return self._gateways.counts.exchange(records, times)

    async def streams_paused(self, generation: int, pause_s: float) -> None:
        """Record a gateway's report of how long its streams paused while a generation formed."""
        if self.runner.controller is not None:
            self.runner.controller.cluster.paused(generation, pause_s)
            self._background.notify()

    async def placement(self) -> dict[str, Any]:
        """Return the maps, current load and balancedness of all banks (``placement --json``)."""
        return placement_document(await self._fresh_cluster())

    async def load(self) -> dict[str, Any]:
        """Return the tokens of each expert and copy, and the balancedness (``load --json``)."""
        return load_document(await self._fresh_cluster())

    async def numbers(self) -> dict[str, Any]:
        """Return ``snapshot`` and ``load`` with the current stats of every worker."""
        cluster = await self._fresh_cluster()
        return {"snapshot": self._snapshot(), "load": load_document(cluster)}

    async def begin(self, kind: str, command: dict[str, Any]) -> dict[str, Any]:
        """Begin a client's command (see ``Commands.begin``); return the operation or the adapter.

        Returns once a worker has stored the new state, so that a controller restart cannot lose it.
        """
        controller = await self._serving_controller()
        begun = self.runner.handle_event(partial(controller.commands.begin, kind, command))
        await self._background.wait(begun.is_settled, begun.limit_s)
        await self._kept(controller)
        return begun.answer()

    async def log(self, process: str, after: int) -> dict[str, Any]:
        """Return the newest log ``lines`` of a worker or ``controller``, and the ``number`` of all.

        Raises ``UnknownNameError`` and ``NotReadyError``.
        """
        await self.restore()
        if process == "controller":
            number, lines = logs.RECENT_LINES.since(after)
        else:
            number, lines = await self._group.log(process, after)
        return {"number": number, "lines": lines}

    async def operation(self, operation_id: str) -> dict[str, Any]:
        """Return one operation. Raises ``UnknownNameError``."""
        controller = await self._serving_controller()
        return controller.cluster.operations.find(operation_id).to_dict()

    async def operations(self) -> list[dict[str, Any]]:
        """Return the recorded operations, newest last."""
        await self.restore()
        controller = self.runner.controller
        return controller.cluster.operations.to_list() if controller is not None else []

    async def cancel_operation(self, operation_id: str) -> dict[str, Any]:
        """Cancel an operation. Raises ``UnknownNameError`` and ``ConflictError``."""
        controller = await self._serving_controller()
        operation = self.runner.handle_event(partial(controller.commands.cancel, operation_id))
        await self._kept(controller)
        return operation.to_dict()

    async def stop(self) -> None:
        """End all workers, and return when they have ended. The caller must then end this actor."""
        await self.restore()
        if (controller := self.runner.controller) is not None:
            self.runner.handle_event(controller.stop)
            state = ClusterState.STOPPED
            await self._background.wait(lambda: controller.cluster.state is state, _STOP_LIMIT_S)
        await self.runner.stop()

    def _set_up_log(self, form: logs.LogForm = "text") -> None:
        if self._has_process:
            logs.set_up("controller", form)

    async def _fresh_cluster(self) -> Cluster | None:
        """Return the cluster with the current stats of every worker; None before the start."""
        await self.restore()
        if (controller := self.runner.controller) is None:
            return None
        self.runner.handle_event(controller.request_status)
        workers = controller.cluster.workers
        await self._background.wait(lambda: workers.status_complete, self._status_limit_s)
        return controller.cluster

    async def _serving_controller(self) -> Controller:
        """Return the running controller. Raises ``ConflictError`` before the start."""
        await self.restore()
        if self.runner.controller is None:
            raise ConflictError(self.runner.failure or "the cluster has not been started")
        return self.runner.controller

    async def _kept(self, controller: Controller) -> None:
        """Wait until a worker has stored the current state, so that it survives a restart.

        Raises ``NotReadyError`` if that takes too long or another controller takes over. The
        command may have begun; a retry with the same ``request_id`` does not begin another.
        """
        cluster = controller.cluster
        version = cluster.sent_version
        await self._background.wait(
            lambda: self.runner.controller is not controller or cluster.is_kept(version),
            _KEEP_LIMIT_S,
        )
        if self.runner.controller is not controller:
            raise NotReadyError(self.runner.failure)
        if not cluster.is_kept(version):
            raise NotReadyError("no worker has acknowledged the command yet: it may be forgotten")

    def _snapshot(self) -> dict[str, Any]:
        mine: dict[str, Any] = {"controller_pid": os.getpid(), "release": RELEASE}
        if self.runner.controller is not None:
            return self.runner.controller.snapshot() | mine
        if self.runner.failure:
            state = ClusterState.RECOVERING if self._handoff.is_pending else ClusterState.STOPPED
            mine |= {"state": state.value, "error": self.runner.failure}
        return snapshot_before_start() | mine

    def _version(self) -> int:
        controller = self.runner.controller
        return controller.cluster.version if controller is not None else 0


async def _beat() -> None:
    """Write to the watchdog as long as the event loop runs. The watchdog ends with this task."""
    watchdog = start_watchdog(log=logs.OUTPUT.error_file)
    beats = watchdog.stdin
    assert beats is not None
    os.set_blocking(beats.fileno(), False)
    try:
        with beats:
            while True:
                beats.write(b".")
                await asyncio.sleep(BEAT_S)
    except BrokenPipeError:
        logger.warning("the controller's watchdog has ended")
