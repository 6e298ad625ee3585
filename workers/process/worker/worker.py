"""One worker without its Ray actor: its control side, its roles, and the data thread.

The data thread loads the weights. Then it loops: it handles the controller's frames and, while a
generation runs, runs a step. The control client's thread only queues frames and reads counters.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from msgspec.structs import replace

from cluster.core.errors import GenerationChangedError, PeerLostError
from cluster.core.frames import KeepAdapters, Register, Shutdown, WorkerReady
from cluster.core.topology import Member
from cluster.tracing.exporter import start_traces
from workers.dispatch.dispatcher import max_static_ranks
from workers.engine.group_channels import GroupChannels
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.engine.step_channel import StepChannel
from workers.engine.step_leader import StepLeader
from workers.experts.transfer.peer_source import KEY
from workers.metrics.activity import Activity, thread_cpu_clock
from workers.metrics.step_metrics import StepMetrics
from workers.metrics.step_timer import TimingSink
from workers.metrics.step_trace import StepTrace
from workers.metrics.traced_steps import StepSpans
from workers.model.families.base import Family
from workers.model.huge_pages import collapse_weights
from workers.native.thread_team import start_kernels
from workers.process.context import ModelSetup, WorkerContext
from workers.process.control.membership import MembershipState
from workers.process.data_plane import (
    IDLE_WAIT_S,
    StepInterrupts,
    make_identity,
    open_connections,
    open_transport,
)
from workers.process.gpu_memory import captured_sizes
from workers.process.roles.attention_listeners import AttentionListeners
from workers.process.roles.experts import BanksOf
from workers.process.roles.loading import load_attention, load_experts
from workers.process.roles.roles import Roles
from workers.process.worker.control_side import ControlSide
from workers.process.worker.lifetime import STOP_TIMEOUT_S, Lifetime
from workers.process.worker_args import WorkerArgs
from workers.transport.collective import CollectiveTransport
from workers.transport.peer_connections import PeerConnections
from workers.transport.transport import DataTransport

logger = logging.getLogger(__name__)

OnDeath = Callable[[str], None]
"""Called with the reason when a worker fails, on the data thread or the control thread."""
_WAITS = {"attention": "combine", "expert": "receive", "colocated": "receive"}
"""Name of the step lap in which a worker waits for other workers, by role."""
_MAX_STATIC_PROMPTS = 128
"""Maximum number of prompts in a step without waits of the host: two launches each, in a layer."""


class Worker:
    """Starts one worker, runs its data thread, and ends it."""

    def __init__(
        self, args: WorkerArgs, on_death: OnDeath, banks_of: BanksOf | None = None
    ) -> None:
        self.args = args
        self.banks_of = banks_of
        self.config = args.config
        is_local = args.config.workers.mode == "local"
        self._step_metrics = StepMetrics(None if is_local else _WAITS[args.member.role])
        self.member = replace(args.member, pid=os.getpid(), node=args.member.node or args.host)
        self._on_death = on_death
        self._cleanup = ExitStack()
        self.activity = Activity()
        self.lifetime = Lifetime()
        self.roles = Roles()
        self._interrupts = StepInterrupts()
        self.control = ControlSide(
            args,
            roles=self.roles,
            activity=self.activity,
            step_metrics=self._step_metrics,
            interrupts=self._interrupts,
            on_failed=self._die,
        )
        self.membership = self.control.membership
        self._thread = threading.Thread(target=self._main, name=self.member.name, daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the data thread is running."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the data thread without waiting for it."""
        self._thread.start()

    def stop(self) -> None:
        """End the loop, and wait at most ``STOP_TIMEOUT_S`` for the data thread to end."""
        self.lifetime.stop()
        self._interrupts.interrupt(self.membership.generation.number + 1)
        self._thread.join(STOP_TIMEOUT_S)

    def _main(self) -> None:
        self.activity.cpu_s = thread_cpu_clock()
        self._cleanup.callback(self.control.close)
        try:
            context = self.open()
            info = self.load(context)
            checkpoint, device = context.model.checkpoint, self.args.device
            collapse_weights(device.type, checkpoint.loaded_bytes, self.activity.advance)
            self.control.send(WorkerReady(info=info))
            megabytes = checkpoint.loaded_bytes // 10**6
            logger.info("%s has loaded %d MB of weights", self.member.name, megabytes)
            while self._handle_commands():
                self.roles.between_steps()
                self._run_step(context.connections)
        except Exception as err:
            logger.exception("%s cannot continue", self.member.name)
            self._die(f"{type(err).__name__}: {err}")
            return
        finally:
            self._cleanup.close()
        if not self.lifetime.is_stopped_in_time():
            self._on_death("ended by the controller")

    def open(self) -> WorkerContext:
        """Connect to the controller, read checkpoint headers, open listeners, register."""
        args, section = self.args, self.config.engine
        kernels = start_kernels(args.threads, args.torch_reason)
        self.control.start()
        model = ModelSetup.of(args, kernels, self.control.reports.loading)
        self.member = replace(self.member, offer=model.exactness.offer)
        me = make_identity(args, model.checkpoint)
        connections = open_connections(args, me, model.checkpoint, model.dtype)
        self._cleanup.callback(connections.close)
        self._interrupts.attach(connections)
        leader = StepLeader(
            prefill_cap=PrefillCap.of(section),
            micro_batches=MicroBatchRule.of(section, args.config.workers),
            buckets=captured_sizes(args, model.family),
            max_static_ranks=_max_static_ranks(args, model.family),
        )
        groups = self._open_groups(connections, leader)
        channel = groups.channels[0] if groups else StepChannel(connections, leader)
        transport = self.open_transport(connections)
        self._cleanup.callback(transport.close)
        self.membership.set_data_plane(connections, groups or channel, transport)
        context = WorkerContext(
            args=args,
            member=self.member,
            me=me,
            model=model,
            membership=self.membership,
            send=self.control.send,
            contact_at=lambda: self.control.contact_at,
            connections=connections,
            channel=channel,
            transport=transport,
            group_channels=groups,
            group_transports=self._open_group_transports(connections),
            activity=self.activity,
            timing_sinks=self._open_timing_sinks(),
            cleanup=self._cleanup,
        )
        self.member = self.announce(context, replace(self.member, data_address=connections.address))
        info = {"threads": model.exactness.threads, "kernels": model.kernels.description}
        info |= args.device_facts
        self.control.send(Register(member=self.member, build=me.build, info=info))
        return context

    def _open_groups(
        self, connections: PeerConnections, leader: StepLeader
    ) -> GroupChannels | None:
        groups = range(self.config.workers.num_step_groups)
        if self.member.runs_attention or len(groups) == 1:
            return None
        return GroupChannels([StepChannel(connections, leader, group) for group in groups])

    def _open_group_transports(self, connections: PeerConnections) -> Sequence[DataTransport]:
        """Open the transports of an expert worker for the step groups after the first."""
        if self.member.runs_attention:
            return ()
        groups = range(1, self.config.workers.num_step_groups)
        found = [open_transport(self.args, connections, group) for group in groups]
        for transport in found:
            self._cleanup.callback(transport.close)
        return found

    def open_transport(self, connections: PeerConnections) -> DataTransport:
        """Open the transport; a collective one adds its store's address to this worker's record."""
        transport = open_transport(self.args, connections)
        if isinstance(transport, CollectiveTransport):
            self.member = replace(self.member, store_address=transport.rendezvous.store_address)
        return transport

    def announce(self, context: WorkerContext, member: Member) -> Member:
        """Open the listeners of the roles; returns the member with their addresses."""
        if member.holds_experts:
            self._weights = context.open_peer_server("weights", KEY.size)
            member = replace(member, weights_address=self._weights.address)
        if member.runs_attention:
            self._listeners = AttentionListeners(context)
            self.control.on_fenced = self._listeners.stream.close_streams
            member = self._listeners.with_addresses(member)
        return member

    def load(self, context: WorkerContext) -> dict[str, Any]:
        """Read the weights of the roles; returns the facts for ``WorkerReady``."""
        if not self.member.runs_attention:
            return load_experts(context, self.roles, self._weights, self.banks_of)
        weights = self._weights if self.member.holds_experts else None
        return load_attention(context, self.roles, self._listeners, weights, self.banks_of)

    def _open_timing_sinks(self) -> list[TimingSink]:
        """Open the sinks of step times: metrics, and if configured a timeline and trace spans."""
        section, name = self.config.observability, self.member.name
        sinks: list[TimingSink] = [self._step_metrics]
        if (trace := StepTrace.of(section, name)) is not None:
            self._cleanup.callback(trace.close)
            sinks.append(trace)
        if (traces := start_traces(section.otlp_endpoint, name)) is not None:
            self._cleanup.callback(traces.stop)
            rank = None if self.member.holds_experts else self.member.rank
            sinks.append(StepSpans(traces.record_child, name, rank))
        return sinks

    def _run_step(self, connections: PeerConnections) -> None:
        """Run one step. If a peer is lost or a new generation follows, stop this generation."""
        self.activity.begin_iteration()
        membership = self.membership
        try:
            if membership.is_running:
                self.roles.run_step()
            else:
                self.activity.is_idle, self.activity.wants_rows = True, False
                connections.poll_idle(
                    IDLE_WAIT_S, is_ready=membership.state is MembershipState.READY
                )
        except GenerationChangedError:
            membership.stop_steps()
        except PeerLostError as err:
            membership.report_lost_peer(err)

    def _handle_commands(self) -> bool:
        """Carry out queued commands of the controller; False after a command to end."""
        for frame in self.control.commands.pending():
            if isinstance(frame, Shutdown):
                self.lifetime.end()
            elif isinstance(frame, KeepAdapters):
                self.roles.keep_adapters(frame)
            else:
                self.membership.handle(frame)
        return not self.lifetime.is_ending

    def _die(self, reason: str) -> None:
        if self.lifetime.is_ending:
            return
        self.control.fail(reason)
        self._on_death(reason)


def _max_static_ranks(args: WorkerArgs, family: Family) -> int:
    """Return ``max_static_ranks`` for steps over NCCL; 0 if a layer may launch so many kernels that
    the host must not enqueue two layers (see ``CollectiveTransport``)."""
    section, config = args.config.engine, family.config
    is_nccl = args.device.type == "cuda" and args.config.is_collective
    is_plain = config.latent_rank is None and config.delta_net is None
    if not is_nccl or not is_plain or section.max_num_seqs > _MAX_STATIC_PROMPTS:
        return 0
    return max_static_ranks(family.banks, section.combine_mode)
