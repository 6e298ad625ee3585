"""Base class of a world: the torch.distributed process groups of one generation (gloo or NCCL).

One thread builds a world, and another may abandon it meanwhile: ``abandon`` drops all existing
groups, and groups that are created later are dropped immediately.
"""

from __future__ import annotations

import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from workers.model.torch_private import Store, TCPStore, Work
from workers.transport.transport import Direction

Backend = Literal["gloo", "nccl"]
Channel = tuple[Direction, bool]
"""Direction of messages, and whether they go from a lower to a higher rank of the world."""
ONE_WAY: tuple[Channel, ...] = (("rows", True), ("outputs", False))
"""Channels of a world with two pools, whose attention ranks have the lowest ranks."""
BOTH_WAYS: tuple[Channel, ...] = (*ONE_WAY, ("rows", False), ("outputs", True))
"""Channels of colocated workers."""
WATCH_S = 0.05
"""Interval between two calls of ``watch`` in a wait."""
_OPENING_TAG = 1 << 30
"""Tag of the exchange that opens connections, larger than the tags of messages."""
_ABANDONED = "the process groups were abandoned"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldSetup:
    """Rank, peers and settings of one worker in a world."""

    prefix: str
    """Prefix of the world's keys in the store."""
    rank: int
    size: int
    peers: tuple[int, ...]
    """World ranks of the other pool."""
    channels: tuple[Channel, ...]
    sends: tuple[Direction, ...]
    """Directions in which this worker sends to its peers."""
    receives: tuple[Direction, ...]
    host: str
    """Interface of the sockets."""
    device: torch.device
    connect_timeout_s: float
    step_timeout_s: float


class Item(NamedTuple):
    """A send or receive that will be started."""

    rank: int
    """Rank in the other pool."""
    peer: int
    """Rank in the world."""
    tag: int
    tensor: Tensor


@dataclass(slots=True)
class Transfer:
    """One send or receive that was started."""

    rank: int
    """Rank in the other pool."""
    work: Work
    tensor: Tensor | None
    """Kept alive until the transfer ends, or until the device stream is ordered after it."""


@dataclass(slots=True)
class Transfers:
    """Sends or receives of one channel that were started together."""

    items: Sequence[Transfer]
    num_done: int = 0
    """Number of complete transfers."""
    error: str = ""
    """Error of the transfer with index ``num_done``; empty if it has not failed."""
    finished: threading.Event = field(default_factory=threading.Event)
    """Gloo only: set when all transfers are complete or one has failed."""


class World(ABC):
    """The process groups of one generation.

    Each channel has its own group, so that transfers of two channels cannot wait for each other on
    one CUDA stream. Within a channel there is no deadlock: the highest rank only sends or only
    receives, so it never waits for a cycle of ranks, nor, by induction, does the next lower rank.
    """

    def __init__(self, setup: WorldSetup) -> None:
        self.setup = setup
        self._groups: dict[Channel, Any] = {}
        self._lock = threading.Lock()
        self._is_abandoned = False

    # ---- the thread that builds it ----------------------------------------------------------

    def connect(self, store: Store) -> None:
        """Connect to all other members through ``store``. Blocks.

        Collective: all members of the generation must call it. Raises ``RuntimeError``, also if
        the world is abandoned during the call.
        """
        self._connect(store)
        self._open_connections()

    @abstractmethod
    def _connect(self, store: Store) -> None:
        """Create the groups and publish each one."""

    def _publish(self, channels: Sequence[Channel], group: Any) -> None:
        """Register a group; if the world is abandoned, drop it and raise ``RuntimeError``."""
        with self._lock:
            if not self._is_abandoned:
                self._groups |= dict.fromkeys(channels, group)
                return
        self._drop([group])
        raise RuntimeError(_ABANDONED)

    def _open_connections(self) -> None:
        """Exchange one element with every peer, so that no step has to open a connection.

        The first send or receive may block until the peer takes part in it, so all workers use
        the channels in the same order.
        """
        setup = self.setup
        deadline = time.monotonic() + setup.step_timeout_s

        def watch() -> None:
            if self._is_abandoned:
                raise RuntimeError(_ABANDONED)
            if time.monotonic() > deadline:
                raise RuntimeError(f"no first exchange within {setup.step_timeout_s:g} s")

        under_way: list[Transfers] = []
        for channel in setup.channels:
            for is_send, directions in ((True, setup.sends), (False, setup.receives)):
                if channel[0] in directions:
                    items = [
                        Item(rank, peer, _OPENING_TAG, torch.zeros(1, device=setup.device))
                        for rank, peer in enumerate(setup.peers)
                        if peer != setup.rank
                    ]
                    under_way += self._start_on(channel, is_send, items)
        for transfers in under_way:
            self.wait(transfers, watch)
            if transfers.error:
                raise RuntimeError(transfers.error)

    # ---- the data thread --------------------------------------------------------------------

    def start(self, direction: Direction, is_send: bool, items: Sequence[Item]) -> list[Transfers]:
        """Start sends or receives. Raises ``RuntimeError``."""
        up = self._start_on((direction, True), is_send, items)
        return up + self._start_on((direction, False), is_send, items)

    def _start_on(self, channel: Channel, is_send: bool, items: Sequence[Item]) -> list[Transfers]:
        """Start the sends or receives of one channel, if any."""
        part = [i for i in items if ((i.peer > self.setup.rank) == is_send) == channel[1]]
        if not part:
            return []
        group = self._groups.get(channel)
        if group is None:
            raise RuntimeError(_ABANDONED)
        return [self._start(group, is_send, part)]

    @abstractmethod
    def _start(self, group: Any, is_send: bool, items: Sequence[Item]) -> Transfers:
        """Start transfers of one channel."""

    @abstractmethod
    def is_over(self, transfers: Transfers) -> bool:
        """Whether all transfers are complete or one has failed (``error``). Does not wait."""

    def order(self, transfers: Transfers) -> bool:
        """Let the device's current stream, but not the host, wait for the transfers.

        Sets ``error`` as ``is_over`` does. Returns False without an effect if the device has no
        streams.
        """
        return False

    @abstractmethod
    def wait(self, transfers: Transfers, watch: Callable[[], None]) -> None:
        """Wait until ``is_over``. ``watch`` is called every 50 ms and may raise to end the wait."""

    # ---- any thread -------------------------------------------------------------------------

    def abandon(self) -> None:
        """Abandon the world and its pending transfers. Does not wait."""
        with self._lock:
            self._is_abandoned = True
            channels = sorted(self._groups, key=self._abort_order)
            groups = list({id(g): g for g in map(self._groups.__getitem__, channels)}.values())
            self._groups = {}
        self._drop(groups)

    def _abort_order(self, channel: Channel) -> tuple[bool, bool]:
        """Return the key that sorts the channels for ``abandon``.

        Channels on which this worker sends are first (outputs before rows), so that it does not
        send results of data that never arrived.
        """
        return channel[0] not in self.setup.sends, channel[0] == "rows"

    @abstractmethod
    def _drop(self, groups: list[Any]) -> None:
        """End groups, in this order, without waiting for them; remove them from the list."""

    @abstractmethod
    def join(self, timeout_s: float) -> None:
        """Wait for the threads of an abandoned world, which must end before the process."""


def listen_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Open the rendezvous store of an attention worker on ``host``; port 0 is a free port."""
    listener = socket.create_server((host, port))
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
