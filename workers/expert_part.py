"""The part of a worker that holds experts: its slots, what serves steps with them, what loads more.

Expert workers and colocated workers have one each.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cluster.config import WorkersSection
from cluster.control_frames import LoadExperts
from cluster.placement import ExpertPlacement
from workers.checkpoint import Checkpoint
from workers.control_client import ControlClient
from workers.dist.activity import Activity
from workers.dist.expert_server import ExpertServer
from workers.dist.handshake import PeerIdentity
from workers.dist.transport import DataTransport
from workers.experts.loading import CHECKPOINT, ExpertLoader, OpenSource
from workers.experts.paced import Pace, PacedSlots
from workers.experts.peer_source import GIVE_UP, PEER, PacedSource, PeerSource
from workers.experts.rate_limit import RateLimit
from workers.experts.slots import ExpertSlots
from workers.experts.sources import CheckpointSource, ExpertSource
from workers.experts.speed import blank_bank, slots_per_second
from workers.experts.weight_client import WeightClient
from workers.experts.weight_frames import expert_num_bytes
from workers.experts.weight_server import WeightServer
from workers.families.base import BankSpec
from workers.worker_args import WorkerArgs


def _paced(section: WorkersSection, banks: Sequence[BankSpec]) -> PacedSlots | None:
    """What stands in for experts that are to wait and not to compute; None where they compute."""
    pace = Pace(slot_s=section.paced_slot_us / 1e6, token_s=section.paced_token_us / 1e6)
    return PacedSlots(banks, pace) if pace.slot_s or pace.token_s else None


class ExpertPart:
    """The experts that the first placement gives a worker's device, in memory and ready."""

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
        me: PeerIdentity,
        weights: WeightServer,
    ) -> None:
        """Fill ``slots``, which are empty, and give their experts out by ``weights``.

        Raises ``CheckpointError``.
        """
        assert args.placement is not None, "a worker with experts is started with a placement"
        slots.load_placement(args.placement, args.member.device, checkpoint)
        self._slots = slots
        self._args = args
        self._me = me
        self._checkpoint = checkpoint
        self._given_up = threading.Event()
        self.server = ExpertServer(
            transport,
            _paced(args.config.workers, checkpoint.family.banks) or slots,
            checkpoint.family.banks,
            device_index=args.member.device,
            combine_mode=args.config.engine.combine_mode,
            dtype=dtype,
            device=args.device,
            activity=activity,
        )
        """Serves steps."""
        weights.start(slots)
        sources: dict[str, OpenSource] = {CHECKPOINT: self._open_checkpoint, PEER: self._open_peer}
        can_grow = args.device.type == "cpu"
        self._loader = ExpertLoader(
            slots,
            sources,
            control.send,
            max_slots=None if can_grow else args.num_slots,
            min_slots=args.num_slots,
        )

    def order(self, order: LoadExperts) -> None:
        """Load experts in the background. Control thread.

        Orders with a ``limit_s`` are moves: those that are not done yet are given up when the
        controller says so (kind ``give up``), or by ``give_up_moves``.
        """
        if order.source.get("kind") == GIVE_UP:
            self.give_up_moves()
            return
        self._loader.order(replace(order, source={**order.source, GIVE_UP: self._given_up}))

    def give_up_moves(self) -> None:
        """What a move was to change is not wanted any more. Control thread."""
        given_up, self._given_up = self._given_up, threading.Event()
        given_up.set()

    def keep_only(self, placement: ExpertPlacement) -> None:
        """A generation runs with this placement: free what it does not use. Control thread."""
        device = self._args.member.device
        self._loader.keep_only([bank.physical_to_logical[device] for bank in placement.banks])

    def facts(self) -> dict[str, float]:
        """For ``WorkerReady``: slots, bytes of an expert of the largest bank, maybe the speed."""
        sizes = (expert_num_bytes(b.spec, b.dtype) for b in self._slots.banks)
        found: dict[str, float] = {
            "num_slots": self._args.num_slots,
            "expert_bytes": max(sizes, default=0),
        }
        if self._args.config.workers.device_speed == "measured":
            found["device_speed"] = self._speed()
        return found

    def _speed(self) -> float:
        """Slots a second, of the first bank; nothing else works on the device yet."""
        bank, filled = self._slots.banks[0], sorted(self._slots.contents(0))
        if not filled:
            bank, filled = blank_bank(bank), [0]
        return slots_per_second(bank, bank.spec, filled, bank.dtype, bank.device)

    def stats(self) -> dict[str, float]:
        """Gauges and counters for heartbeats; called on the control thread."""
        return {
            "expert_worker_tokens_total": float(self.server.num_tokens),
            "expert_worker_slots": float(max((b.num_slots for b in self._slots.banks), default=0)),
            **self.server.padding.stats(),
        }

    def close(self) -> None:
        """End loading."""
        self.give_up_moves()
        self._loader.close()

    # ---- where further experts come from ----------------------------------------------------

    def _rate(self, source: Mapping[str, Any]) -> RateLimit:
        """Of an order's ``bytes_per_s`` and ``limit_s``; both may be missing."""
        bytes_per_s, limit_s = source.get("bytes_per_s"), source.get("limit_s")
        return RateLimit(
            float(bytes_per_s) if bytes_per_s else None,
            limit_s=float(limit_s) if limit_s else None,
            cancelled=source[GIVE_UP] if limit_s else None,
        )

    def _open_checkpoint(self, source: Mapping[str, Any]) -> ExpertSource:
        return PacedSource(CheckpointSource(self._checkpoint.another()), self._rate(source))

    def _open_peer(self, source: Mapping[str, Any]) -> ExpertSource:
        rate = self._rate(source)
        connect = partial(
            WeightClient,
            str(source["peer"]),
            str(source["address"]),
            self._me,
            self._args.config.cluster_token,
            rate=rate,
            timeout_s=self._args.config.transport.connect_timeout_s,
        )
        return PeerSource(connect, rate)
