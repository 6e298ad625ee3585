"""The experts of a worker: slots, the server of steps, the loader.

Expert workers and colocated workers have one each.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace

from cluster.core.frames import LoadExperts
from cluster.core.placement import ExpertPlacement
from workers.dispatch.dispatcher import SlotBank
from workers.dispatch.expert_server import ExpertServer
from workers.experts.slots import ExpertSlots
from workers.experts.sources import ExpertSource
from workers.experts.speed import blank_bank, slots_per_second
from workers.experts.transfer.faster_source import FasterSource, HoldersSource
from workers.experts.transfer.loading import (
    CHECKPOINT,
    ExpertLoader,
    Obstacle,
    OpenSource,
    SlotOrder,
)
from workers.experts.transfer.peer_source import (
    GIVE_UP,
    PEER,
    ExpertLender,
    PeerSource,
)
from workers.experts.transfer.rate_limit import RateLimit
from workers.metrics.activity import Activity
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec
from workers.model.loading.checkpoint import Checkpoint
from workers.process.control.control_client import ControlClient
from workers.process.gpu_room import captured_sizes
from workers.process.warm_up import warm_experts
from workers.process.worker_args import WorkerArgs
from workers.requests.buckets import kept_rows
from workers.transport.handshake import PeerIdentity
from workers.transport.peer_link import Peer, PeerClient, PeerServer
from workers.transport.transport import DataTransport

logger = logging.getLogger(__name__)

BanksOf = Callable[[ExpertSlots], Sequence[SlotBank]]
"""Makes the banks that compute steps from a worker's slots. The default is the slots themselves."""


class ExpertPart:
    """The experts of one worker, loaded as its first placement says."""

    def __init__(
        self,
        args: WorkerArgs,
        slots: ExpertSlots,
        checkpoint: Checkpoint,
        transport: DataTransport,
        control: ControlClient,
        *,
        dtype: torch.dtype,
        activity: Activity,
        timer: StepTimer,
        me: PeerIdentity,
        weights: PeerServer,
        obstacle: Callable[[Sequence[SlotOrder], int], Obstacle | None],
        banks_of: BanksOf | None = None,
    ) -> None:
        """Fill the empty ``slots``, and serve their experts to other workers by ``weights``.

        Raises ``CheckpointError``.
        """
        assert args.placement is not None, "a worker with experts is started with a placement"
        self.slots = slots
        self._args = args
        self._me = me
        self._checkpoint = checkpoint
        self._given_up = threading.Event()
        self._read_bytes = Counter({CHECKPOINT: 0, PEER: 0})
        """By kind of the source."""
        self._load(args.placement)
        warm_experts(args, slots, transport.sums_are_rounded)
        self.server = ExpertServer(
            transport,
            banks_of(slots) if banks_of is not None else slots.banks,
            checkpoint.family.banks,
            device_index=args.member.device,
            combine_mode=args.config.engine.combine_mode,
            dtype=dtype,
            device=args.device,
            activity=activity,
            timer=timer,
            max_kept_rows=kept_rows(captured_sizes(args, checkpoint.family))
            * args.config.workers.num_attention_ranks,
        )
        weights.start(ExpertLender(slots))
        sources: dict[str, OpenSource] = {CHECKPOINT: self._open_checkpoint, PEER: self._open_peer}
        can_grow = args.device.type == "cpu"
        self._loader = ExpertLoader(
            slots,
            sources,
            control.send,
            obstacle=obstacle,
            max_slots=None if can_grow else args.num_slots,
            min_slots=args.num_slots,
        )

    def order(self, order: LoadExperts) -> None:
        """Load experts in the background. Control thread.

        Orders with a ``limit_s`` are moves: unfinished moves are given up by an order of kind
        ``give up``, or by ``give_up_moves``.
        """
        if order.source.get("kind") == GIVE_UP:
            self.give_up_moves()
            return
        self._loader.order(replace(order, source={**order.source, GIVE_UP: self._given_up}))

    def give_up_moves(self) -> None:
        """Give up unfinished moves. Control thread."""
        given_up, self._given_up = self._given_up, threading.Event()
        given_up.set()

    def keep_only(self, placement: ExpertPlacement) -> None:
        """A generation runs with ``placement``: free the other slots. Control thread."""
        device = self._args.member.device
        self._loader.keep_only([bank.physical_to_logical[device] for bank in placement.banks])

    def facts(self) -> dict[str, float]:
        """For ``WorkerReady``: slots, bytes of an expert of the largest bank, speed if measured."""
        sizes = (b.spec.num_bytes(b.dtype.itemsize) for b in self.slots.banks)
        found: dict[str, float] = {
            "num_slots": self._args.num_slots,
            "expert_bytes": max(sizes, default=0),
        }
        if self._args.config.workers.device_speed == "measured":
            found["device_speed"] = self._speed()
        return found

    def _speed(self) -> float:
        """Slots a second of the first bank; the device is otherwise idle at this time."""
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
                for kind, num_bytes in self._read_bytes.items()
            },
            **self.server.stats(),
        }

    def close(self) -> None:
        self.give_up_moves()
        self._loader.close()

    # ---- sources of the first experts -------------------------------------------------------

    def _load(self, placement: ExpertPlacement) -> None:
        """Load the first experts, from other workers where these are faster than the disk."""
        counted = self._counted(CHECKPOINT)
        own = self.slots.checkpoint_source(self._checkpoint, counted, is_idle=True)
        device, source = self._args.member.device, self._first_source(own)
        self.slots.load_placement(placement, device, self._checkpoint, source)
        if isinstance(source, FasterSource):
            read = " and ".join(f"{n} bytes from {kind}" for kind, n in self._read_bytes.items())
            rates = ", ".join(f"{kind} {rate / 1e6:.0f}" for kind, rate in source.rates.items())
            logger.info("%s read %s (MB/s: %s)", self._args.member.name, read, rates)

    def _first_source(self, checkpoint: ExpertSource) -> ExpertSource:
        if not self._args.holders:
            return checkpoint
        rate = RateLimit(self._args.config.rebalance.bytes_per_s)
        peers = HoldersSource(
            self._args.holders,
            lambda holder: self._peer_source(holder.name, holder.address, rate),
            self._read_elsewhere,
        )
        return FasterSource({CHECKPOINT: checkpoint, PEER: peers})

    def _read_elsewhere(self, bank: BankSpec, expert: int) -> None:
        self._checkpoint.count(self._checkpoint.expert_bytes(bank, expert))

    def _counted(
        self, kind: str, take: Callable[[int], None] = lambda num_bytes: None
    ) -> Callable[[int], None]:
        """``take``, which counts the bytes that it gets."""

        def counted(num_bytes: int) -> None:
            self._read_bytes[kind] += num_bytes
            take(num_bytes)

        return counted

    # ---- sources of further experts ---------------------------------------------------------

    def _rate(self, source: Mapping[str, Any]) -> RateLimit:
        """The limit from an order's ``bytes_per_s`` and ``limit_s``; both may be missing."""
        bytes_per_s, limit_s = source.get("bytes_per_s"), source.get("limit_s")
        return RateLimit(
            float(bytes_per_s) if bytes_per_s else None,
            limit_s=float(limit_s) if limit_s else None,
            cancelled=source[GIVE_UP] if limit_s else None,
        )

    def _open_checkpoint(self, source: Mapping[str, Any]) -> ExpertSource:
        take = self._counted(CHECKPOINT, self._rate(source).take)
        return self.slots.checkpoint_source(self._checkpoint.another(), take)

    def _open_peer(self, source: Mapping[str, Any]) -> ExpertSource:
        return self._peer_source(str(source["peer"]), str(source["address"]), self._rate(source))

    def _peer_source(self, name: str, address: str, rate: RateLimit) -> PeerSource:
        peer = Peer(name=name, address=address, me=self._me, token=self._args.config.cluster_token)
        timeout_s = self._args.config.transport.connect_timeout_s
        take = self._counted(PEER, rate.take)
        return PeerSource(partial(PeerClient, peer, timeout_s, before_chunk=take), rate)
