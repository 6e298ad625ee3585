"""What all kinds of worker have in common: life, control socket, opening, the data thread.

One data thread does all the work: it loads the weights, then turns a loop. Each turn handles what
the controller sent and, while a generation runs, one step. The control client's thread only hands
frames over and reads counters.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Set
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.control_frames import (
    ControlFrame,
    DrainWish,
    ExpertsLoaded,
    Heartbeat,
    Keepsake,
    LoadExperts,
    LoadProgress,
    NewGeneration,
    Register,
    RunGeneration,
    Shutdown,
    StatusReply,
    WorkerFailed,
    WorkerReady,
)
from cluster.errors import (
    GenerationChangedError,
    NotReadyError,
    PeerLostError,
)
from cluster.load_report import LoadReport
from cluster.placement import ExpertPlacement
from cluster.topology import Generation, Member
from workers.checkpoint import Checkpoint, resolve_dtype
from workers.control_client import ControlClient
from workers.data_plane import identify, open_hub, open_transport
from workers.dist.activity import Activity
from workers.dist.collective import CollectiveTransport
from workers.dist.hub import PeerHub
from workers.dist.micro_batches import MicroBatchRule
from workers.dist.prefill_cap import PrefillCap
from workers.dist.step_channel import StepChannel
from workers.dist.traced import Traced, TracedTransport
from workers.dist.transport import DataTransport
from workers.expert_part import ExpertPart
from workers.experts.slots import ExpertSlots
from workers.experts.weight_server import WeightServer
from workers.huge_pages import collapse_weights
from workers.lanes import Lanes
from workers.lease import Lease
from workers.membership import Membership, MembershipHooks
from workers.step_metrics import StepMetrics
from workers.step_trace import StepTrace
from workers.worker_args import WorkerArgs

logger = logging.getLogger(__name__)

OnDeath = Callable[[str], None]
"""Called with the reason, on the data thread, when a worker cannot go on."""
IDLE_WAIT_S = 1.0
"""Longest time that the loop sleeps without turning."""
PROGRESS_EVERY_S = 0.2
"""Shortest time between two reports of loading progress."""
LEASE_LIMITS = 1.8
"""Lease in detection limits: below two, so that a silent worker stops before it is forgotten."""
_WAITS = {
    "attention": ("combine",),
    "expert": ("receive",),
    "colocated": ("receive",),
}
"""Spans in which a worker waits for others."""
STOP_TIMEOUT_S = 5.0
"""Time that the data thread has to end."""


class WorkerRuntime(ABC):
    """One worker without Ray around it. Subclasses add what they load and what a step is."""

    _traced: Traced | None = None
    """What measures a step."""
    _measured: TracedTransport | None = None
    """What counts the bytes between a worker's experts and everybody's rows."""
    _experts: ExpertPart | None = None
    """The expert slots of a worker that has some, once they are filled."""

    def __init__(self, args: WorkerArgs, on_death: OnDeath) -> None:
        self.args = args
        self.config = args.config
        self.step_metrics = StepMetrics(*self._waits())
        node = args.member.node or args.host
        self.member = replace(args.member, pid=os.getpid(), node=node)
        self.membership = Membership(
            self.member.name,
            MembershipHooks(
                send=self._send,
                enter=self._enter,
                lose_members=self._lose_members,
                begin_steps=self._go_on,
            ),
        )
        self._on_death = on_death
        self._hub: PeerHub | None = None
        self._cleanup = ExitStack()
        self._frames: deque[ControlFrame] = deque()
        self.activity = Activity()
        self._idle = True
        self._stopping = False
        self._is_connected = False
        self._wishes_drain = False
        self._memory: dict[str, Any] = {}
        self._reported_at = 0.0
        self._load_reported_at = 0.0
        self._rows_reported = 0
        self._thread = threading.Thread(target=self._main, name=self.member.name, daemon=True)

    # ---- what a kind of worker adds ---------------------------------------------------------

    @abstractmethod
    def _load(self) -> dict[str, Any]:
        """Read the weights; returns the facts for ``WorkerReady``."""

    @abstractmethod
    def _enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        """Take a generation whose edges are open, and its maps."""

    def _begin_steps(self) -> None:
        """A generation runs."""
        number = self.membership.generation.number
        logger.debug("%s runs generation %d", self.member.name, number)

    def _lose_members(self, names: Set[str]) -> None:
        """Workers with which it has run steps died; the last step was given up."""
        logger.info("%s goes on without %s", self.member.name, ", ".join(sorted(names)))

    @abstractmethod
    def _turn(self) -> None:
        """Wait for the next step and run it, or return after a wake-up."""

    @abstractmethod
    def _between_steps(self) -> None:
        """Work that every turn does first, running or not."""

    def _stats(self) -> dict[str, float]:
        """Gauges and counters for heartbeats; called on the control thread."""
        return {}

    def _load_report(self) -> LoadReport | None:
        """What it has counted of the experts' load; called on the control thread."""
        return None

    def _announce(self) -> Member:
        """Open further listeners before registration; returns the member with its addresses."""
        return self.member

    @abstractmethod
    def _close_gates(self) -> None:
        """The lease ran out: let no client have anything from this worker (control thread)."""

    @abstractmethod
    def _open_gates(self) -> None:
        """A generation runs: clients may come again."""

    # ---- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the data thread; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End the loop and wait for it."""
        self._stopping = True
        self._interrupt(self.membership.generation.number + 1)
        self._thread.join(STOP_TIMEOUT_S)

    def wish_drain(self) -> bool:
        """Ask to be drained; False when that makes no sense, or was asked before (any thread)."""
        if not self.membership.runs or self._stopping or self._wishes_drain:
            return False
        self._wishes_drain = True
        self.control.send(DrainWish())
        return True

    def redirect(self, control_address: str) -> None:
        """A restarted controller listens there. Raises ``NotReadyError`` before the first one."""
        if not self._is_connected:
            raise NotReadyError(f"{self.member.name} has not called a controller yet")
        self.control.redirect(control_address)

    @property
    def is_alive(self) -> bool:
        """Whether the data thread runs."""
        return self._thread.is_alive()

    def _main(self) -> None:
        try:
            self.lanes = Lanes.for_threads(self.args.threads)
            self._open()
            info = self._load()
            collapse_weights(
                self.args.device.type, self.checkpoint.loaded_bytes, self.activity.advance
            )
            self.control.send(WorkerReady(info=info))
            while not self._stopping:
                self._handle_frames()
                self._between_steps()
                self._guarded_turn()
        except Exception as err:
            logger.exception("%s cannot go on", self.member.name)
            self._die(f"{type(err).__name__}: {err}")
        finally:
            self._cleanup.close()

    def _open(self) -> None:
        """Reach the controller, read the checkpoint's headers, open the listeners, register."""
        self.control = self._open_control()
        self._cleanup.callback(self.control.close)
        self.checkpoint = Checkpoint(Path(self.config.model.path), self._report_loading)
        self.family = self.checkpoint.family
        self.dtype = resolve_dtype(self.config.model.dtype, self.family.config)
        me = self._me = identify(self.args, self.checkpoint)
        hub = self._hub = open_hub(self.args, me, self.checkpoint, self.dtype)
        self._cleanup.callback(hub.close)
        engine = self.config.engine
        self.channel = StepChannel(
            hub,
            prefill_cap=PrefillCap.of(engine),
            micro_batches=MicroBatchRule.of(engine, self.config.workers),
        )
        self.transport = self._open_transport()
        self._cleanup.callback(self.transport.close)
        self.membership.join(hub, self.channel, self.transport)
        trace = self._open_trace()
        self.span_sinks = (self.step_metrics, *(() if trace is None else (trace,)))
        self.member = replace(self.member, data_address=hub.address)
        if self.member.holds_experts:
            self._weights = WeightServer(me, self.config.cluster_token, host=self.args.host)
            self._cleanup.callback(self._weights.close)
            self.member = replace(self.member, weights_address=self._weights.address)
        self.member = self._announce()
        info = {"threads": self.args.threads, "device": str(self.args.device)}
        info["host"] = socket.gethostname()
        self.control.send(Register(member=asdict(self.member), info=info))

    def _open_control(self) -> ControlClient:
        transport = self.config.transport
        control = ControlClient(
            self.args.control_address,
            self.config.cluster_token,
            self.member.name,
            self._on_frame,
            heartbeat=self._heartbeat,
            status=self._status,
            heartbeat_s=transport.heartbeat_s,
            connect_timeout_s=transport.connect_timeout_s,
            lease=Lease(
                limit_s=self.lease_s,
                last_commit=lambda: self.membership.last_commit,
                on_expired=self._fence,
            ),
            rejoin=self._rejoin,
        )
        control.start()
        self._is_connected = True
        return control

    @property
    def lease_s(self) -> float:
        """Time without controller and without committed step after which this worker stops."""
        return LEASE_LIMITS * self.config.transport.detection_limit_s

    @property
    def hub(self) -> PeerHub:
        """The data-plane sockets. Data thread only, but for ``wake`` and ``interrupt``."""
        assert self._hub is not None, "the hub is opened before anything uses it"
        return self._hub

    def _open_transport(self) -> DataTransport:
        """The transport, whose address becomes known to the others where it has one."""
        transport = open_transport(self.args, self.hub)
        if isinstance(transport, CollectiveTransport):
            self.member = replace(self.member, store_address=transport.store_address)
        return transport

    def _load_experts(self, transport: DataTransport) -> ExpertPart:
        """Load the experts that the placement gives this worker's device."""
        traced = self._measured = TracedTransport(transport, self.span_sinks, self.family.banks)
        transport = self._traced = traced
        part = ExpertPart(
            self.args,
            self._expert_slots(),
            self.checkpoint,
            transport,
            self.control,
            dtype=self.dtype,
            activity=self.activity,
            me=self._me,
            weights=self._weights,
        )
        self._cleanup.callback(part.close)
        self._experts = part
        return part

    def _waits(self) -> tuple[str, ...]:
        return () if self.config.workers.mode == "local" else _WAITS[self.args.member.role]

    def _all_stats(self) -> dict[str, float]:
        measured = self._measured.stats() if self._measured is not None else {}
        return {**self._stats(), **self.step_metrics.stats(), **measured}

    def _open_trace(self) -> StepTrace | None:
        section = self.config.observability
        if section.trace_dir is None:
            return None
        trace = StepTrace(Path(section.trace_dir), self.member.name, section.trace_max_bytes)
        self._cleanup.callback(trace.close)
        return trace

    def _expert_slots(self) -> ExpertSlots:
        """Empty slots for this worker's experts."""
        return ExpertSlots(
            self.family.banks,
            self.args.num_slots,
            self.dtype,
            self.args.device,
            self.lanes,
            self.config.engine.deterministic,
        )

    def _die(self, reason: str) -> None:
        if self._stopping:
            return
        if self._is_connected:
            self.control.send(WorkerFailed(reason=reason))
            self.control.close()
        self._on_death(reason)

    def _send(self, frame: ControlFrame) -> None:
        self.control.send(frame)

    # ---- the control thread -----------------------------------------------------------------

    def _on_frame(self, frame: ControlFrame) -> None:
        """Hand a frame to the data thread, and interrupt its wait where the frame demands it."""
        if isinstance(frame, LoadExperts):
            self._order_experts(frame)
            return
        if isinstance(frame, Keepsake):
            self._memory = frame.memory
            return
        if isinstance(frame, RunGeneration):
            self._free_experts(frame)
        self._frames.append(frame)
        if isinstance(frame, NewGeneration):
            if self._experts is not None:
                self._experts.give_up_moves()
            self.membership.announced = frame
            self._interrupt(int(frame.generation["number"]))
        elif isinstance(frame, Shutdown):
            self._interrupt(self.membership.generation.number + 1)
        elif self._hub is not None:
            self._hub.wake()

    def _free_experts(self, frame: RunGeneration) -> None:
        """Experts that were taken over from a lost worker are not needed when another has come."""
        order = self.membership.announced
        if self._experts is None or order is None or order.generation["number"] != frame.generation:
            return
        self._experts.keep_only(ExpertPlacement.from_dict(order.placement))

    def _order_experts(self, order: LoadExperts) -> None:
        """The loader's thread does it; the data thread goes on."""
        if self._experts is not None:
            self._experts.order(order)
            return
        error = f"{self.member.name} has no expert slots"
        self.control.send(ExpertsLoaded(order=order.order, error=error))

    def _interrupt(self, generation: int) -> None:
        if self._hub is not None:
            self._hub.interrupt(generation)

    def _heartbeat(self) -> Heartbeat:
        due = time.monotonic() - self._load_reported_at >= self.config.load.report_s
        return Heartbeat(
            progress=self.activity.progress,
            idle=self._idle,
            generation=self.membership.generation.number,
            waiting=self.activity.is_waiting,
            fenced=self.membership.is_fenced,
            stats={
                **self._all_stats(),
                "placement_epoch": float(self.membership.epochs.current.epoch),
            },
            expert_load=self._new_load() if due else {},
        )

    def _fence(self, reason: str) -> None:
        """The lease ran out: leave this generation, and let no client have anything of it."""
        logger.warning("%s is fenced: %s", self.member.name, reason)
        self.membership.is_fenced = True
        self._close_gates()
        if self._hub is not None:
            self._hub.wake()

    def _rejoin(self) -> list[ControlFrame]:
        """Where this worker stands, for a controller that knows nothing of it."""
        return self.membership.standing(self.control.term, self._memory)

    def _status(self) -> StatusReply:
        report = self._load_report()
        load = {} if report is None else report.to_dict()
        return StatusReply(token=0, stats=self._all_stats(), expert_load=load)

    def _new_load(self) -> dict[str, Any]:
        """The report, where it says anything that the last heartbeat with one did not."""
        self._load_reported_at = time.monotonic()
        report = self._load_report()
        if report is None or report.rows == self._rows_reported:
            return {}
        self._rows_reported = report.rows
        return report.to_dict()

    # ---- the data thread --------------------------------------------------------------------

    def _guarded_turn(self) -> None:
        """One turn; a lost peer or a new generation ends the running of this one."""
        self.activity.advance()
        membership = self.membership
        try:
            if membership.is_fenced:
                membership.runs = False
            if membership.runs:
                self._turn()
            else:
                self._idle = True
                self.hub.rest(IDLE_WAIT_S)
        except GenerationChangedError:
            membership.runs = False
        except PeerLostError as err:
            membership.lose(err)

    def _handle_frames(self) -> None:
        while self._frames:
            frame = self._frames.popleft()
            if isinstance(frame, Shutdown):
                self._stopping = True
            else:
                self.membership.handle(frame)

    def _go_on(self) -> None:
        """A generation runs, and clients may come again."""
        self._begin_steps()
        self._open_gates()

    def _report_loading(self, loaded_bytes: int, total_bytes: int) -> None:
        """Progress callback of the loaders."""
        self.activity.advance()
        now = time.monotonic()
        if loaded_bytes >= total_bytes or now - self._reported_at >= PROGRESS_EVERY_S:
            self._reported_at = now
            self.control.send(LoadProgress(loaded_bytes=loaded_bytes, total_bytes=total_bytes))
