"""The base of all workers: start and end, control socket, listeners, the data thread.

The data thread loads the weights and then loops over the controller's frames and, while a
generation runs, a step. The control client's thread only queues frames and reads counters.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cluster.config.model import Quantize
from cluster.core.checks import check
from cluster.core.errors import GenerationChangedError, NotReadyError, PeerLostError
from cluster.core.frames import (
    ControlFrame,
    DrainRequest,
    KeepAdapters,
    Register,
    Shutdown,
    SlotContents,
    WorkerFailed,
    WorkerReady,
)
from cluster.core.load_report import LoadReport
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation, Member
from cluster.tracing import logs
from cluster.tracing.disks import DiskWatch
from cluster.tracing.exporter import start_traces
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.engine.step_channel import StepChannel
from workers.experts.slots import ExpertSlots, torch_experts
from workers.experts.transfer.peer_source import KEY
from workers.metrics.activity import Activity, thread_cpu_clock
from workers.metrics.step_metrics import StepMetrics
from workers.metrics.step_timer import StepTimer, TimingSink
from workers.metrics.step_trace import StepTrace
from workers.metrics.traced_steps import StepSpans
from workers.model.compute_threads import ComputeThreads
from workers.model.cuda.device import gpu_stats
from workers.model.huge_pages import collapse_weights
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.config_file import resolve_dtype
from workers.model.loading.expert_form import rounded_form
from workers.native.team import start_kernels
from workers.process.control.control_client import ControlClient
from workers.process.control.lease import Lease
from workers.process.control.membership import Membership, MembershipHooks, Standing
from workers.process.control.reports import WorkerReports
from workers.process.data_plane import identify, open_connections, open_transport
from workers.process.exactness import Exactness
from workers.process.expert_part import BanksOf, ExpertPart
from workers.process.gpu_room import captured_sizes, check_room_for_slots
from workers.process.lifetime import STOP_TIMEOUT_S, Lifetime
from workers.process.orders import Orders
from workers.process.worker_args import WorkerArgs
from workers.quantization.formats import WeightFormat
from workers.transport.collective import CollectiveTransport
from workers.transport.peer_connections import PeerConnections
from workers.transport.peer_link import PeerServer
from workers.transport.transport import DataTransport

logger = logging.getLogger(__name__)

OnDeath = Callable[[str], None]
"""Called with the reason, on the data thread, when a worker fails."""
IDLE_WAIT_S = 1.0
"""Longest sleep of the loop."""
_WAITS = {"attention": "combine", "expert": "receive", "colocated": "receive"}
"""Timing of a step in which a worker waits for others, by role."""


class WorkerRuntime(ABC):
    """One worker without its Ray actor. Subclasses add the loading and the step of their role."""

    _experts: ExpertPart | None = None
    """Expert slots of a worker that has some, when they are filled."""

    def __init__(
        self, args: WorkerArgs, on_death: OnDeath, banks_of: BanksOf | None = None
    ) -> None:
        self.args = args
        self.banks_of = banks_of
        self.config = args.config
        is_local = args.config.workers.mode == "local"
        self.step_metrics = StepMetrics(None if is_local else _WAITS[args.member.role])
        self.member = replace(args.member, pid=os.getpid(), node=args.member.node or args.host)
        self.membership = Membership(
            self.member.name,
            MembershipHooks(
                send=self._send,
                enter=self._enter_generation,
                lose_members=self._lose_members,
                begin_steps=self._begin_steps,
                slots=self._slot_contents,
            ),
        )
        self._on_death = on_death
        self._connections: PeerConnections | None = None
        self._cleanup = ExitStack()
        self._orders = Orders(
            membership=self.membership,
            experts=lambda: self._experts,
            send=self._send,
            wake=self._wake,
            interrupt=self._interrupt,
        )
        self.activity = Activity()
        trace_dir = args.config.observability.trace_dir
        timelines = None if trace_dir is None else Path(trace_dir)
        self._reports = WorkerReports(
            membership=self.membership,
            activity=self.activity,
            stats=lambda: {**self._stats(), **self.step_metrics.stats(), **gpu_stats(args.device)},
            load=self._load_report,
            load_every_s=self.config.load.report_s,
            send=self._send,
            disks=DiskWatch(lambda: [logs.OUTPUT.folder, timelines]),
            adapters_in_use=self._adapters_in_use,
            waits_for=self._waits_for,
            problems=self._problems,
        )
        self._control: ControlClient | None = None
        self.lifetime = Lifetime()
        self._thread = threading.Thread(target=self._main, name=self.member.name, daemon=True)

    # ---- what a role adds -------------------------------------------------------------------

    @abstractmethod
    def _load(self) -> dict[str, Any]:
        """Read the weights; returns the facts for ``WorkerReady``."""

    @abstractmethod
    def _enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        """Take the maps of a generation whose edges are open."""

    def _begin_steps(self) -> None:
        """A generation runs: begin steps and accept clients."""
        generation = self.membership.generation
        logs.CONTEXT.generation = generation.number
        names = ", ".join(m.name for m in generation.members)
        logger.info("%s runs generation %d: %s", self.member.name, generation.number, names)

    def _lose_members(self, names: Set[str]) -> None:
        """Members of the last generation died; the last step was given up."""
        logger.info("%s continues without %s", self.member.name, ", ".join(sorted(names)))

    @abstractmethod
    def _run_step(self) -> None:
        """Wait for a step and run it, or return after a wake-up."""

    @abstractmethod
    def _between_steps(self) -> None:
        """Work at the start of every iteration, in a generation or not."""

    def _slot_contents(self) -> SlotContents:
        """What the expert slots hold; none where there are none, or while they are filled."""
        return self._experts.slots.rows() if self._experts is not None else ()

    def _stats(self) -> dict[str, float]:
        """Gauges and counters for heartbeats; called on the control thread."""
        return self._experts.stats() if self._experts is not None else {}

    def _adapters_in_use(self) -> tuple[str, ...]:
        """Keys of adapters that requests here have. Control thread."""
        return ()

    def _load_report(self) -> LoadReport | None:
        """Counted load of the experts; called on the control thread."""
        return None

    def _waits_for(self) -> tuple[str, ...]:
        """Peers for which the data thread waits. Control thread."""
        return self._connections.loop.awaited if self._connections is not None else ()

    def _problems(self) -> tuple[str, ...]:
        """What keeps parts of this worker from working, for people. Control thread."""
        return ()

    def _announce(self) -> Member:
        """Open further listeners before registration; returns the member with their addresses."""
        return self.member

    # ---- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the data thread; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End the loop and wait for it."""
        self.lifetime.stop()
        self._interrupt(self.membership.generation.number + 1)
        self._thread.join(STOP_TIMEOUT_S)

    def follow(self, term: int, controller: str) -> None:
        """A controller orders by a call of Ray. Raises ``SupersededError``."""
        if self.has_called:
            self.control.follow(term, controller)

    def request_drain(self) -> bool:
        """Ask for a drain; False outside a generation, or when already asked (any thread)."""
        if not self.membership.is_member or not self.lifetime.leave():
            return False
        self.control.send(DrainRequest())
        return True

    def redirect(self, control_address: str, term: int, controller: str) -> None:
        """Connect to a restarted controller. Raises ``SupersededError``, ``NotReadyError``."""
        if not self.has_called:
            raise NotReadyError(f"{self.member.name} has not called a controller yet")
        self.follow(term, controller)
        self.control.redirect(control_address)

    def _main(self) -> None:
        self.activity.cpu_s = thread_cpu_clock()
        try:
            self.kernels = start_kernels(self.args.threads, self.args.why_torch)
            self._open()
            info = self._load()
            device = self.args.device.type
            collapse_weights(device, self.checkpoint.loaded_bytes, self.activity.advance)
            self.control.send(WorkerReady(info=info))
            loaded = self.checkpoint.loaded_bytes
            logger.info("%s has loaded %d MB of weights", self.member.name, loaded // 10**6)
            while self._obey():
                self._between_steps()
                self._guarded_step()
        except Exception as err:
            logger.exception("%s cannot go on", self.member.name)
            self._die(f"{type(err).__name__}: {err}")
            return
        finally:
            self._cleanup.close()
        if not self.lifetime.is_stopped_in_time():
            self._on_death("told to end")

    def _open(self) -> None:
        """Reach the controller, read the checkpoint's headers, open the listeners, register."""
        self._control = self._open_control()
        self._cleanup.callback(self._control.close)
        self.checkpoint = Checkpoint(
            Path(self.config.model.path),
            self._reports.loading,
            self._quantize(),
            has_predictor=self.config.speculation.has_predictor,
        )
        self.family = self.checkpoint.family
        self.dtype = resolve_dtype(self.config.model.dtype, self.family.config)
        self._exactness = Exactness.of(self.args, self.kernels, self.family.banks, self.dtype)
        device_type, num_threads = self.args.device.type, self._exactness.torch_threads
        self.compute_threads = ComputeThreads.for_threads(num_threads, device_type)
        self.member = replace(self.member, offer=self._exactness.offer)
        me = self._me = identify(self.args, self.checkpoint)
        connections = self._connections = open_connections(
            self.args, me, self.checkpoint, self.dtype
        )
        self._cleanup.callback(connections.close)
        engine = self.config.engine
        self.channel = StepChannel(
            connections,
            prefill_cap=PrefillCap.of(engine),
            micro_batches=MicroBatchRule.of(engine, self.config.workers),
            buckets=captured_sizes(self.args, self.family),
        )
        self.transport = self._open_transport()
        self._cleanup.callback(self.transport.close)
        self.membership.join(connections, self.channel, self.transport)
        self._timing_sinks: list[TimingSink] = [self.step_metrics]
        if (trace := StepTrace.of(self.config.observability, self.member.name)) is not None:
            self._cleanup.callback(trace.close)
            self._timing_sinks.append(trace)
        if (spans := self._open_spans()) is not None:
            self._timing_sinks.append(spans)
        self.member = replace(self.member, data_address=connections.address)
        if self.member.holds_experts:
            self._weights = self._peer_server("weights", KEY.size)
            self.member = replace(self.member, weights_address=self._weights.address)
            self.kernels = self.kernels.noting(torch_experts(self.family.banks, self.dtype))
        self.member = self._announce()
        info = {"threads": self._exactness.threads, "kernels": self.kernels.words}
        info |= self.args.device_facts
        self.control.send(Register(member=self.member, build=me.build, info=info))

    def _enter_generation(self, generation: Generation, placement: ExpertPlacement) -> None:
        self._exactness.follow(generation.agreement)
        self._enter(generation, placement)

    def _peer_server(self, what: str, key_bytes: int) -> PeerServer:
        """A listener for other workers of the cluster, open until this worker ends."""
        token, host = self.config.cluster_token, self.args.host
        server = PeerServer(self._me, token, host=host, what=what, key_bytes=key_bytes)
        self._cleanup.callback(server.close)
        return server

    def _open_control(self) -> ControlClient:
        transport = self.config.transport
        control = ControlClient(
            self.args.control_address,
            self.config.cluster_token,
            self.member.name,
            self._orders.take,
            heartbeat=self._reports.heartbeat,
            status=self._reports.status,
            heartbeat_s=transport.heartbeat_s,
            alive_s=transport.alive_s,
            connect_timeout_s=transport.connect_timeout_s,
            lease=Lease(
                limit_s=transport.lease_s,
                last_commit=lambda: self.membership.last_shared_commit,
                on_expired=self._fence,
            ),
            worker_report=self._orders.report,
            on_failed=self._die,
        )
        control.start()
        return control

    @property
    def has_called(self) -> bool:
        """It has reached a controller once."""
        return self._control is not None

    @property
    def control(self) -> ControlClient:
        """The socket to the controller."""
        assert self._control is not None, "the controller is called before anything uses this"
        return self._control

    @property
    def connections(self) -> PeerConnections:
        """The data-plane sockets. Data thread only, but for ``wake`` and ``interrupt``."""
        assert self._connections is not None, "the connections are opened before anything uses them"
        return self._connections

    def _open_transport(self) -> DataTransport:
        """Open the transport; the address of its store, if any, goes to the other members."""
        transport = open_transport(self.args, self.connections)
        if isinstance(transport, CollectiveTransport):
            self.member = replace(self.member, store_address=transport.store_address)
        return transport

    def _load_experts(self, transport: DataTransport) -> ExpertPart:
        part = ExpertPart(
            self.args,
            self._expert_slots(),
            self.checkpoint,
            transport,
            self.control,
            dtype=self.dtype,
            activity=self.activity,
            timer=self._new_timer(),
            me=self._me,
            weights=self._weights,
            obstacle=partial(self.membership.obstacle, self.member.device),
            banks_of=self.banks_of,
        )
        self._cleanup.callback(part.close)
        self._experts = part
        return part

    def _open_spans(self) -> StepSpans | None:
        """Spans of steps, where the configuration names a collector."""
        name = self.member.name
        traces = start_traces(self.config.observability.otlp_endpoint, name)
        if traces is None:
            return None
        self._cleanup.callback(traces.stop)
        rank = None if self.member.holds_experts else self.member.rank
        return StepSpans(traces.record_below, name, rank)

    def _new_timer(self) -> StepTimer:
        return StepTimer(*self._timing_sinks)

    def _quantize(self) -> Quantize:
        """How experts are kept: as they are stored where kernels of ours compute them."""
        setting = self.config.model.quantize
        has_kernels = self.args.device.type == "cuda" or self.kernels.team is not None
        return setting if has_kernels or setting != "auto" else "none"

    def _form_of_products(self) -> WeightFormat | None:
        """In which products that are no experts are quantized; None: in the model dtype."""
        section = self.config.model
        if section.quantize_layers == "experts":
            return None
        has_kernels = self.kernels.team is not None
        rule = f"needs compiled kernels, this worker has {self.kernels.words}"
        check(has_kernels, "quantize_layers", section.quantize_layers, rule)
        return rounded_form(section.quantize, ())

    def _expert_slots(self) -> ExpertSlots:
        args, threads, team = self.args, self.compute_threads, self.kernels.team
        is_strict = self.config.engine.deterministic == "on"
        num, dtype, device = args.num_slots, self.dtype, args.device
        check_room_for_slots(args, self.family, dtype)
        return ExpertSlots(self.family.banks, num, dtype, device, threads, is_strict, team)

    def _die(self, reason: str) -> None:
        if self.lifetime.is_ending:
            return
        if self.has_called:
            self.control.send(WorkerFailed(reason=reason))
            self.control.close()
        self._on_death(reason)

    def _send(self, frame: ControlFrame) -> None:
        self.control.send(frame)

    # ---- the control thread -----------------------------------------------------------------

    def _wake(self) -> None:
        if self._connections is not None:
            self._connections.wake()

    def _interrupt(self, generation: int) -> None:
        if self._connections is not None:
            self._connections.interrupt(generation)

    def _fence(self, reason: str) -> None:
        """The lease ran out: leave this generation. Called on the control thread."""
        logger.warning("%s is fenced: %s", self.member.name, reason)
        fence = self.membership.raise_fence()
        self._close_gates(fence)
        if self._connections is not None:
            self._connections.leave(fence)

    def _close_gates(self, fence: int) -> None:
        """Refuse clients until a generation above the fence runs. Called on the control thread."""
        logger.debug("%s runs no generation up to %d", self.member.name, fence)

    # ---- the data thread --------------------------------------------------------------------

    def _keep_adapters(self, order: KeepAdapters) -> None:
        """Have these adapters; only workers that run attention are asked to."""
        logger.error("%s runs no attention, and is to have adapters", self.member.name)

    def _guarded_step(self) -> None:
        """Run one step; a lost peer or a new generation ends this generation."""
        self.activity.begin_iteration()
        membership = self.membership
        try:
            if membership.runs:
                self._run_step()
            else:
                self.activity.is_idle, self.activity.wants_rows = True, False
                self.connections.rest(IDLE_WAIT_S, is_ready=membership.standing is Standing.READY)
        except GenerationChangedError:
            membership.leave()
        except PeerLostError as err:
            membership.lose(err)

    def _obey(self) -> bool:
        """Take the controller's orders; False if this worker ends."""
        for frame in self._orders.pending():
            if isinstance(frame, Shutdown):
                self.lifetime.end()
            elif isinstance(frame, KeepAdapters):
                self._keep_adapters(frame)
            else:
                self.membership.handle(frame)
        return not self.lifetime.is_ending
