"""The controller as a Ray actor, with the methods that launchers, gateways and commands call.

``ControllerRunner`` runs the controller. If Ray restarts the actor, the workers of the previous
controller keep serving. The restarted actor first collects the state of the workers, and most calls
to the actor wait until it has tried once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.actors.controller_runner import ControllerRunner
from cluster.actors.handoff import Handoff
from cluster.actors.tasks import Background
from cluster.config.cluster import ClusterConfig
from cluster.controller.cluster import Cluster
from cluster.controller.controller import Controller
from cluster.controller.documents import (
    SharedDocuments,
    load_document,
    placement_document,
    snapshot_before_start,
)
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
"""Longest wait for the current stats of the workers, in seconds."""
_STOP_LIMIT_S = 20.0
_KEEP_LIMIT_S = 5.0
"""Longest wait, in seconds, until a worker has stored the controller state after a command."""


class ControllerActor:
    """Async Ray actor that starts and controls at most one cluster.

    Created and called through ``cluster.actors.controller_client``.
    """

    def __init__(
        self,
        group: WorkerGroup,
        status_limit_s: float = STATUS_LIMIT_S,
        *,
        has_process: bool = False,
    ) -> None:
        """``status_limit_s``: longest wait for current stats of the workers, in seconds.

        ``has_process``: whether the actor has a process of its own. If so, the actor sets up
        logging there, and a watchdog kills the process when the event loop hangs.
        """
        self._group = group
        self._status_limit_s = status_limit_s
        self._background = Background()
        self._has_process = self._wants_watchdog = has_process
        self._set_up_log()
        self.runner = ControllerRunner(group, self._background)
        self._gateways = self.runner.gateways
        self._starting = asyncio.Lock()
        self._documents = SharedDocuments()
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

        ``banks``: a dict with ``bank``, ``layer`` and ``num_experts`` for each bank (set of routed
        experts of a layer). ``profile``: load profile (token counts of experts) for predictions.
        ``asked``: the user's options by flag, which ``origin`` returns. ``free_cpus``: number of
        CPUs that other users of Ray left free before this start; None if there are no other users.
        A second call does nothing. If the start cannot begin, reserved resources are released, and
        ``ConfigError`` or ``StartError`` is raised.
        """
        await self.restore()
        if self._handoff.is_pending:
            raise StartError("controller", self.runner.failure)
        async with self._starting:
            if self.runner.controller is None:
                nodes = await asyncio.to_thread(self._group.resources)
                known = ClusterConfig.from_dict(config)
                self._set_up_log(known)
                plan = plan_start(known, banks, nodes, free_cpus, profile)
                assert plan.load is not None, "the workers do not run yet"
                notes = {"profile": profile, "top_k": plan.load.top_k, "asked": asked}
                await self.runner.start(plan, notes)

    async def restore(self) -> None:
        """Restore the cluster of an earlier controller process, if Ray has restarted this actor.

        Returns after success or after the first failed attempt; further attempts run in the
        background. A restarted actor calls this method itself, and most other calls wait for it.
        """
        if self._wants_watchdog:
            self._wants_watchdog = False
            self._background.spawn(_beat())
        await self._handoff.settle()

    async def origin(self) -> dict[str, Any]:
        """Return ``asked``, the options that ``start`` received, and the cluster's ``config``.

        ``config`` has the cluster token, and resources as planned for the start. Both are None
        before ``start``. Raises ``NotReadyError`` while the workers of an earlier controller cannot
        be reached.
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
        """Return the cluster's state. ``fresh``: first request current stats from all workers."""
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
        """Return the cluster state once its version differs from ``known_version``.

        ``timeout_s``: seconds after which the state is returned even if unchanged. ``gateway``:
        name of the calling gateway, which calls again after every reply; empty for other callers.
        ``low_disks``: folders on nearly full disks of the gateway's ``host``. ``adapters``: keys of
        the LoRA adapters that the gateway's requests use.
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
        """Store gateways' ``records`` (counters, samples); return records newer than ``times``.

        See ``GatewayCounts.exchange``.
        """
        return self._gateways.counts.exchange(records, times)

    async def streams_paused(self, generation: int, pause_s: float) -> None:
        """Record for how long a gateway's token streams paused while ``generation`` formed."""
        if self.runner.controller is not None:
            self.runner.controller.cluster.paused(generation, pause_s)
            self._background.notify()

    async def placement(self) -> dict[str, Any]:
        """Return placement, current load and balancedness of all banks (``placement --json``)."""
        return self._document(placement_document, await self._fresh_cluster())

    async def load(self) -> dict[str, Any]:
        """Return token counts of experts and expert copies, and balancedness (``load --json``)."""
        return self._document(load_document, await self._fresh_cluster())

    async def numbers(self) -> dict[str, Any]:
        """Return the ``snapshot`` and ``load`` documents, with current stats of every worker."""
        cluster = await self._fresh_cluster()
        return {"snapshot": self._snapshot(), "load": self._document(load_document, cluster)}

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
        """Return the log ``lines`` of a process after line ``after``, and the ``number`` of all.

        ``process``: name of a worker, or ``controller``. Only the newest lines are stored. Raises
        ``UnknownNameError`` and ``NotReadyError``.
        """
        await self.restore()
        if process == "controller":
            number, lines = logs.RECENT_LINES.since(after)
        else:
            number, lines = await self._group.log(process, after)
        return {"number": number, "lines": lines}

    async def operation(self, operation_id: str) -> dict[str, Any]:
        """Return an operation (such as a drain) by its id. Raises ``UnknownNameError``."""
        controller = await self._serving_controller()
        return controller.cluster.operations.find(operation_id).to_dict()

    async def operations(self) -> list[dict[str, Any]]:
        """Return the recorded operations (drains, scalings, rebalancings), newest last."""
        await self.restore()
        controller = self.runner.controller
        return controller.cluster.operations.to_list() if controller is not None else []

    async def cancel_operation(self, operation_id: str) -> dict[str, Any]:
        """Cancel and return an operation. Raises ``UnknownNameError`` and ``ConflictError``."""
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

    def _document(
        self, make: Callable[[Cluster | None], dict[str, Any]], cluster: Cluster | None
    ) -> dict[str, Any]:
        return self._documents.get(make, cluster, time.monotonic())

    def _set_up_log(self, config: ClusterConfig | None = None) -> None:
        if self._has_process and config is not None:
            logs.set_up(config.process_name("controller"), config.observability.log_format)
        elif self._has_process:
            logs.set_up("controller")

    async def _fresh_cluster(self) -> Cluster | None:
        """Return the cluster with the current stats of every worker; None before ``start``."""
        await self.restore()
        if (controller := self.runner.controller) is None:
            return None
        self.runner.handle_event(controller.request_status)
        workers = controller.cluster.workers
        await self._background.wait(lambda: workers.status_complete, self._status_limit_s)
        return controller.cluster

    async def _serving_controller(self) -> Controller:
        """Return the running controller. Raises ``ConflictError`` if there is none."""
        await self.restore()
        if self.runner.controller is None:
            raise ConflictError(self.runner.failure or "the cluster has not been started")
        return self.runner.controller

    async def _kept(self, controller: Controller) -> None:
        """Wait until a worker has stored the controller state, which then survives a restart.

        Raises ``NotReadyError`` if no worker has stored the state in time, or another controller
        takes over. The command may still take effect, and a retry with the same ``request_id``
        starts no second one.
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
    """Write to the watchdog process at fixed intervals, which shows that the event loop runs.

    The watchdog ends with this task.
    """
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
