"""The experts role: expert slots, the server that computes rows with them, and the loader."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from msgspec.structs import replace

from cluster.core.frames import LoadExperts
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.dispatch.dispatcher import SlotBank
from workers.dispatch.expert_counters import ExpertCounters
from workers.dispatch.expert_server import ExpertServer
from workers.experts.slots import ExpertSlots
from workers.experts.speed import blank_bank, slots_per_second
from workers.experts.transfer.loading import ExpertLoader
from workers.experts.transfer.peer_source import GIVE_UP, ExpertProvider
from workers.metrics.step_timer import StepTimer
from workers.process.context import WorkerContext
from workers.process.data_plane import IDLE_WAIT_S
from workers.process.gpu_memory import captured_sizes, check_memory_for_slots
from workers.process.roles.expert_sources import ExpertSources
from workers.process.roles.group_steps import GroupSteps
from workers.process.warm_up import warm_experts
from workers.requests.buckets import kept_rows
from workers.requests.step_header import StepHeader
from workers.transport.peer_link import PeerServer
from workers.transport.transport import DataTransport

logger = logging.getLogger(__name__)

BanksOf = Callable[[ExpertSlots], Sequence[SlotBank]]
"""Creates the banks that compute steps with a worker's slots; the default is ``slots.banks``."""


class ExpertRole:
    """Loads experts into this worker's slots, and computes rows of attention workers with them.

    On a worker without attention, this role also runs the steps.
    """

    def __init__(
        self,
        context: WorkerContext,
        transport: DataTransport,
        weights: PeerServer,
        banks_of: BanksOf | None = None,
    ) -> None:
        """Fill the slots as in the first placement; other workers can then fetch the experts from
        ``weights``. Raises ``CheckpointError``.
        """
        args = context.args
        assert args.placement is not None, "a worker with experts is started with a placement"
        self._context = context
        self.slots = slots = make_slots(context)
        self._cancelled = threading.Event()
        self._busy_s = 0.0
        self._num_steps = 0
        self._sources = ExpertSources(context, slots)
        self._sources.load(args.placement)
        warm_experts(args, slots, transport.sums_are_rounded)
        banks, counters = banks_of(slots) if banks_of else slots.banks, ExpertCounters()
        self.servers = [
            self._make_server(transport, banks, counters, context.new_timer()),
            *(
                self._make_server(other, banks, counters, context.fork_timer(), group)
                for group, other in enumerate(context.group_transports, start=1)
            ),
        ]
        """Server of the steps of each step group, in the order of ``Generation.groups``."""
        self._group_steps: GroupSteps | None = None
        if context.group_channels is not None:
            self._group_steps = GroupSteps(
                context.connections,
                context.group_channels,
                self.servers,
                context.activity,
                begun=self._begin_group_step,
                ended=self._end_group_step,
            )
        weights.start(ExpertProvider(slots))
        membership, can_grow = context.membership, args.device.type == "cpu"
        self._loader = ExpertLoader(
            slots,
            self._sources.by_kind,
            context.send,
            obstacle=partial(membership.obstacle, args.member.device),
            max_slots=None if can_grow else args.num_slots,
            min_slots=args.num_slots,
        )
        context.cleanup.callback(self.close)

    def _make_server(
        self,
        transport: DataTransport,
        banks: Sequence[SlotBank],
        counters: ExpertCounters,
        timer: StepTimer,
        group: int = 0,
    ) -> ExpertServer:
        context, args, family = self._context, self._context.args, self._context.family
        return ExpertServer(
            transport,
            banks,
            family.banks,
            device_index=args.member.device,
            combine_mode=args.config.engine.combine_mode,
            dtype=context.model.dtype,
            device=args.device,
            activity=context.activity,
            timer=timer,
            max_kept_rows=kept_rows(captured_sizes(args, family))
            * args.config.workers.num_attention_ranks,
            yields=context.group_channels is not None,
            group=group,
            counters=counters,
        )

    @property
    def server(self) -> ExpertServer:
        """Server of the steps. Only for workers of one step group."""
        (server,) = self.servers
        return server

    def handle_command(self, command: LoadExperts) -> None:
        """Load experts in the background. Control thread.

        A command with a ``limit_s`` is a migration. Unfinished migrations are cancelled by a
        command of kind ``give up`` and by ``cancel_migrations``.
        """
        if command.source.get("kind") == GIVE_UP:
            self.cancel_migrations()
            return
        self._loader.order(replace(command, source={**command.source, GIVE_UP: self._cancelled}))

    def cancel_migrations(self) -> None:
        """Cancel unfinished migrations. Control thread."""
        given_up, self._cancelled = self._cancelled, threading.Event()
        given_up.set()

    def keep_only(self, placement: ExpertPlacement) -> None:
        """Free the slots that ``placement``, the current one, does not use. Control thread."""
        device = self._context.args.member.device
        self._loader.keep_only([bank.physical_to_logical[device] for bank in placement.banks])

    def enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        """Apply the placement of a new generation with open connections, or of a new epoch."""
        self._context.model.exactness.apply_agreement(generation.agreement)
        for server in self.servers:
            server.set_placement(placement, generation)
        if self._group_steps is not None and self._group_steps.enter(generation):
            for transport in self._context.group_transports:
                transport.apply_generation(generation)

    def run_step(self) -> None:
        """Wait for a step and serve its rows; return without one if the thread is woken."""
        activity, membership = self._context.activity, self._context.membership
        activity.is_idle = True
        if self._group_steps is not None:
            self._group_steps.run(IDLE_WAIT_S)
            return
        header = self._context.channel.wait(IDLE_WAIT_S)
        activity.is_idle = False
        if header is None:
            return
        activity.rows = header.decode_rows + header.prefill_rows
        membership.follow_epoch(header)
        started = time.monotonic()
        self.server.run_step(header)
        self.server.timer.end_step()
        membership.record_commit(is_shared=True)
        activity.advance()
        self._busy_s += membership.last_commit - started
        self._num_steps += 1

    def _begin_group_step(self, group: int, header: StepHeader) -> None:
        self._context.membership.follow_epoch(header, group=group)

    def _end_group_step(self, group: int) -> None:
        self.servers[group].timer.end_step()
        self._context.membership.record_commit(is_shared=True)
        self._context.activity.advance()
        self._num_steps += 1

    def facts(self) -> dict[str, float]:
        """Facts for ``WorkerReady``: slots per bank, bytes of the largest expert, ``_speed``."""
        sizes = (b.spec.num_bytes(b.dtype.itemsize) for b in self.slots.banks)
        facts: dict[str, float] = {
            "num_slots": self._context.args.num_slots,
            "expert_bytes": max(sizes, default=0),
        }
        if self._context.args.config.workers.device_speed == "measured":
            facts["device_speed"] = self._speed()
        return facts

    def _speed(self) -> float:
        """Measure how many slots of the first bank the idle device computes per second."""
        bank, filled = self.slots.banks[0], sorted(self.slots.contents(0))
        if not filled:
            bank, filled = blank_bank(bank), [0]
        return slots_per_second(bank.compute, bank.spec, filled, bank.dtype, bank.device)

    def stats(self) -> dict[str, float]:
        """Gauges and counters for heartbeats; called on the control thread."""
        return {
            "expert_worker_slots": float(max((b.num_slots for b in self.slots.banks), default=0)),
            **{
                f'expert_weights_read_bytes_total{{source="{kind}"}}': float(num_bytes)
                for kind, num_bytes in self._sources.read_bytes.items()
            },
            **self.servers[0].stats(),  # the counters of all servers
        }

    def step_stats(self) -> dict[str, float]:
        """Metrics of the steps that this role runs; called on the control thread."""
        groups = self._group_steps
        return {
            "expert_worker_busy_seconds_total": groups.busy_s if groups else self._busy_s,
            "steps_total": float(self._num_steps),
        }

    def close(self) -> None:
        self.cancel_migrations()
        self._loader.close()


def make_slots(context: WorkerContext) -> ExpertSlots:
    """Create empty slots. Raises ``ConfigError`` if a GPU is too small for them."""
    args, model = context.args, context.model
    check_memory_for_slots(args, context.family, model.dtype)
    return ExpertSlots(
        context.family.banks,
        args.num_slots,
        model.dtype,
        args.device,
        model.compute_threads,
        args.config.engine.deterministic == "on",
        model.kernels.team,
    )
