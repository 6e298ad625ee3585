"""A worker's side of the control plane: membership, lease, commands and reports on one socket."""

from __future__ import annotations

import logging
from collections.abc import Callable, Set
from pathlib import Path

from cluster.core.errors import NotReadyError
from cluster.core.frames import ControlFrame, DrainRequest, WorkerFailed
from cluster.tracing import logs
from cluster.tracing.disks import DiskMonitor
from workers.metrics.activity import Activity
from workers.metrics.step_metrics import StepMetrics
from workers.model.cuda.device import gpu_stats
from workers.process.control.control_client import ControlClient
from workers.process.control.lease import Lease
from workers.process.control.membership import Membership, MembershipHooks
from workers.process.control.reports import WorkerReports
from workers.process.data_plane import StepInterrupts
from workers.process.roles.roles import Roles
from workers.process.worker.controller_commands import ControllerCommands
from workers.process.worker.lifetime import Lifetime
from workers.process.worker_args import WorkerArgs

logger = logging.getLogger(__name__)


class ControlSide:
    """Connects a worker to its controller: decides whether it may serve, and passes on commands.

    Any thread may call the methods, unless they state otherwise.
    """

    def __init__(
        self,
        args: WorkerArgs,
        *,
        roles: Roles,
        activity: Activity,
        step_metrics: StepMetrics,
        interrupts: StepInterrupts,
        on_failed: Callable[[str], None],
    ) -> None:
        """``on_failed`` gets the reason if the thread of the socket fails."""
        name, config = args.member.name, args.config
        self._name = name
        self._roles = roles
        self._interrupts = interrupts
        self.has_connected = False
        """Whether the worker has connected to a controller at least once."""
        self.on_fenced: Callable[[int], None] = lambda fence: None
        """Called with the number of the newest generation that must not serve. Control thread."""
        self.membership = Membership(
            name,
            MembershipHooks(
                send=self.send,
                enter=roles.enter,
                lose_members=self._lose_members,
                begin_steps=self._begin_steps,
                slots=roles.slots,
            ),
        )
        self.commands = ControllerCommands(
            membership=self.membership,
            experts=lambda: roles.experts,
            send=self.send,
            wake=interrupts.wake,
            interrupt=interrupts.interrupt,
        )
        trace_dir = config.observability.trace_dir
        timelines = None if trace_dir is None else Path(trace_dir)
        self.reports = WorkerReports(
            membership=self.membership,
            activity=activity,
            stats=lambda: {**roles.stats(), **step_metrics.stats(), **gpu_stats(args.device)},
            load=roles.load_report,
            load_every_s=config.load.report_s,
            send=self.send,
            disks=DiskMonitor(lambda: [logs.OUTPUT.folder, timelines]),
            adapters_in_use=roles.adapters_in_use,
            waits_for=interrupts.awaited_peers,
            problems=lambda: roles.problems(name),
        )
        transport = config.transport
        self._client = ControlClient(
            args.control_address,
            config.cluster_token,
            name,
            self.commands.take,
            heartbeat=self.reports.heartbeat,
            status=self.reports.status,
            heartbeat_s=transport.heartbeat_s,
            alive_s=transport.alive_s,
            connect_timeout_s=transport.connect_timeout_s,
            lease=Lease(
                limit_s=transport.lease_s,
                last_commit=lambda: self.membership.last_shared_commit,
                on_expired=self._fence,
            ),
            worker_report=self.commands.report,
            on_failed=on_failed,
        )

    @property
    def contact_at(self) -> float:
        """Monotonic time of the newest heartbeat that a controller has acknowledged."""
        return self._client.contact_at

    def start(self) -> None:
        """Connect to the controller. Raises ``PeerLostError`` and ``HandshakeError``."""
        self._client.start()
        self.has_connected = True

    def send(self, frame: ControlFrame) -> None:
        """Send a frame to the controller."""
        self._client.send(frame)

    def close(self) -> None:
        """Send queued frames and close the connection."""
        self._client.close()

    def fail(self, reason: str) -> None:
        """Report to the controller, if connected, that this worker ends for ``reason``."""
        if self.has_connected:
            self.send(WorkerFailed(reason=reason))
            self.close()

    def check_term(self, term: int, controller: str) -> None:
        """See ``TermGuard.check``; does nothing before the first connection to a controller."""
        if self.has_connected:
            self._client.check_term(term, controller)

    def redirect(self, address: str, term: int, controller: str) -> None:
        """Connect to a restarted controller. Raises ``SupersededError``, ``NotReadyError``."""
        if not self.has_connected:
            raise NotReadyError(f"{self._name} has not connected to a controller yet")
        self.check_term(term, controller)
        self._client.redirect(address)

    def request_drain(self, lifetime: Lifetime) -> bool:
        """Ask the controller for a drain; False outside a generation or after an earlier call."""
        if not self.membership.is_member or not lifetime.begin_leaving():
            return False
        self.send(DrainRequest())
        return True

    def _begin_steps(self) -> None:
        """Start the steps of a generation. Data thread."""
        generation = self.membership.generation
        logs.CONTEXT.generation = generation.number
        names = ", ".join(m.name for m in generation.members)
        logger.info("%s runs generation %d: %s", self._name, generation.number, names)
        self._roles.begin_steps(generation.number)

    def _lose_members(self, names: Set[str]) -> None:
        """Handle the death of members of the last generation. Data thread."""
        logger.info("%s continues without %s", self._name, ", ".join(sorted(names)))
        self._roles.lose_members()

    def _fence(self, reason: str) -> None:
        """Leave this generation after the lease expired. Control thread."""
        logger.warning("%s is fenced: %s", self._name, reason)
        fence = self.membership.raise_fence()
        self.on_fenced(fence)
        self._interrupts.end_generations(fence)
