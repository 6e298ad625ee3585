"""Sources of a worker's experts: the checkpoint, and other workers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cluster.core.placement import ExpertPlacement
from workers.experts.slots import ExpertSlots
from workers.experts.sources import ExpertSource
from workers.experts.transfer.faster_source import FasterSource, HoldersSource
from workers.experts.transfer.loading import CHECKPOINT, OpenSource
from workers.experts.transfer.peer_source import GIVE_UP, PEER, PeerSource
from workers.experts.transfer.rate_limit import RateLimit
from workers.model.config import BankSpec
from workers.process.context import WorkerContext
from workers.transport.peer_link import PeerClient, PeerEndpoint

logger = logging.getLogger(__name__)


class ExpertSources:
    """Opens the sources of expert weights, and counts the bytes read by kind of source."""

    def __init__(self, context: WorkerContext, slots: ExpertSlots) -> None:
        self._args = context.args
        self._me = context.me
        self._checkpoint = context.model.checkpoint
        self._slots = slots
        self.read_bytes = Counter({CHECKPOINT: 0, PEER: 0})
        """Bytes read by kind of source."""
        self.by_kind: Mapping[str, OpenSource] = {
            CHECKPOINT: self._open_checkpoint,
            PEER: self._open_peer,
        }
        """Functions, by kind of source, that open a source for a ``LoadExperts`` command."""

    def load(self, placement: ExpertPlacement) -> None:
        """Load the first experts, each from the faster source: checkpoint or other workers."""
        counted = self._count_bytes(CHECKPOINT)
        own = self._slots.checkpoint_source(self._checkpoint, counted, is_idle=True)
        device, source = self._args.member.device, self._first_source(own)
        self._slots.load_placement(placement, device, self._checkpoint, source)
        if isinstance(source, FasterSource):
            read = " and ".join(f"{n} bytes from {kind}" for kind, n in self.read_bytes.items())
            rates = ", ".join(f"{kind} {rate / 1e6:.0f}" for kind, rate in source.rates.items())
            logger.info("%s read %s (MB/s: %s)", self._args.member.name, read, rates)

    def _first_source(self, checkpoint: ExpertSource) -> ExpertSource:
        if not self._args.holders:
            return checkpoint
        rate = RateLimit(self._args.config.rebalance.bytes_per_s)
        peers = HoldersSource(
            self._args.holders,
            lambda holder: self._peer_source(holder.name, holder.address, rate),
            self._count_peer_read,
        )
        return FasterSource({CHECKPOINT: checkpoint, PEER: peers})

    def _count_peer_read(self, bank: BankSpec, expert: int) -> None:
        self._checkpoint.count(self._checkpoint.expert_bytes(bank, expert))

    def _count_bytes(
        self, kind: str, take: Callable[[int], None] = lambda num_bytes: None
    ) -> Callable[[int], None]:
        """Return a function that counts bytes of this kind, then calls ``take``."""

        def counted(num_bytes: int) -> None:
            self.read_bytes[kind] += num_bytes
            take(num_bytes)

        return counted

    def _rate(self, source: Mapping[str, Any]) -> RateLimit:
        """Rate limit from a command's optional ``bytes_per_s`` and ``limit_s``."""
        bytes_per_s, limit_s = source.get("bytes_per_s"), source.get("limit_s")
        return RateLimit(
            float(bytes_per_s) if bytes_per_s else None,
            limit_s=float(limit_s) if limit_s else None,
            cancelled=source[GIVE_UP] if limit_s else None,
        )

    def _open_checkpoint(self, source: Mapping[str, Any]) -> ExpertSource:
        take = self._count_bytes(CHECKPOINT, self._rate(source).take)
        return self._slots.checkpoint_source(self._checkpoint.another(), take)

    def _open_peer(self, source: Mapping[str, Any]) -> ExpertSource:
        return self._peer_source(str(source["peer"]), str(source["address"]), self._rate(source))

    def _peer_source(self, name: str, address: str, rate: RateLimit) -> PeerSource:
        peer = PeerEndpoint(
            name=name, address=address, me=self._me, token=self._args.config.cluster_token
        )
        timeout_s = self._args.config.transport.connect_timeout_s
        take = self._count_bytes(PEER, rate.take)
        return PeerSource(partial(PeerClient, peer, timeout_s, before_chunk=take), rate)
