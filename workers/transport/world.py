"""Base class of a world: the torch.distributed process groups of one generation (gloo or NCCL).

While one thread builds a world, another thread may abandon it: ``abandon`` drops all existing
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
"""Class of messages: (``rows`` or ``outputs``, whether the receiver has the higher world rank)."""
ONE_WAY: tuple[Channel, ...] = (("rows", True), ("outputs", False))
"""Channels of a world with separate attention and expert workers; world ranks of attention workers
are the lowest."""
BOTH_WAYS: tuple[Channel, ...] = (*ONE_WAY, ("rows", False), ("outputs", True))
"""Channels of a world of colocated workers, which send rows and outputs to each other."""
WATCH_S = 0.05
"""Seconds between two calls of ``watch`` in ``World.wait``."""
_OPENING_TAG = 1 << 30
"""Tag of the first transfers, which only open connections; larger than the tags of messages."""
_ABANDONED = "the process groups were abandoned"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldSetup:
    """Rank, peers and settings of one worker in a world (process groups of a generation)."""

    prefix: str
    """Prefix of the world's keys in the rendezvous store."""
    rank: int
    size: int
    peers: tuple[int, ...]
    """World ranks of the workers in the other pool, by their ranks in that pool."""
    channels: tuple[Channel, ...]
    sends: tuple[Direction, ...]
    """Kinds of messages that this worker sends to its peers: ``rows``, ``outputs`` or both."""
    receives: tuple[Direction, ...]
    host: str
    """Address of the network interface on which gloo listens."""
    device: torch.device
    connect_timeout_s: float
    step_timeout_s: float


class Item(NamedTuple):
    """A send or receive of one tensor that will be started."""

    rank: int
    """Rank of the peer in its pool."""
    peer: int
    """Rank of the peer in the world."""
    tag: int
    tensor: Tensor


@dataclass(slots=True)
class Transfer:
    """A send or receive of one tensor that was started."""

    rank: int
    """Rank of the peer in its pool."""
    work: Work
    tensor: Tensor | None
    """Tensor that is sent or filled. The reference keeps the tensor alive until the transfer ends;
    None after ``World.order``, which makes later work on the device wait for the transfer."""


@dataclass(slots=True)
class Transfers:
    """Sends or receives of one channel that were started together."""

    items: Sequence[Transfer]
    num_done: int = 0
    """Number of ``items`` that are complete, from the first on."""
    error: str = ""
    """Error of the transfer with index ``num_done``; empty if no transfer has failed."""
    finished: threading.Event = field(default_factory=threading.Event)
    """Event that is set when all transfers are complete or one has failed; unused with NCCL."""


class World(ABC):
    """The torch.distributed process groups of one generation.

    On GPUs, each channel (kind and direction of messages) has its own group, so that transfers of
    two channels cannot wait for each other on one CUDA stream. Within a channel there is no
    deadlock: the highest rank only sends or only receives, so it never waits in a cycle of ranks,
    nor, by induction, does the next lower rank.
    """

    def __init__(self, setup: WorldSetup) -> None:
        self.setup = setup
        self._groups: dict[Channel, Any] = {}
        self._lock = threading.Lock()
        self._is_abandoned = False

    # ---- the thread that builds it ----------------------------------------------------------

    def connect(self, store: Store) -> None:
        """Create the process groups and connect to all other members through ``store``. Blocks.

        Collective: all members of the generation must call it. Raises ``RuntimeError`` if this
        fails, and if the world is abandoned during the call.
        """
        self._connect(store)
        self._open_connections()

    @abstractmethod
    def _connect(self, store: Store) -> None:
        """Create the process groups, and call ``_publish`` with each group."""

    def _publish(self, channels: Sequence[Channel], group: Any) -> None:
        """Register the process group of ``channels``.

        If the world was abandoned, drops the group and raises ``RuntimeError``.
        """
        with self._lock:
            if not self._is_abandoned:
                self._groups |= dict.fromkeys(channels, group)
                return
        self._drop([group])
        raise RuntimeError(_ABANDONED)

    def _open_connections(self) -> None:
        """Exchange one element with every peer, so that no step has to open a connection.

        The first send or receive may block until the peer takes part, so all workers use the
        channels in the same order. Raises ``RuntimeError``.
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
        """Start sends or receives of one direction, and return them by channel.

        Raises ``RuntimeError`` if the world was abandoned or a connection has failed.
        """
        up = self._start_on((direction, True), is_send, items)
        return up + self._start_on((direction, False), is_send, items)

    def _start_on(self, channel: Channel, is_send: bool, items: Sequence[Item]) -> list[Transfers]:
        """Start the sends or receives in ``items`` that belong to one channel.

        Returns an empty list if no item belongs to the channel.
        """
        part = [i for i in items if ((i.peer > self.setup.rank) == is_send) == channel[1]]
        if not part:
            return []
        group = self._groups.get(channel)
        if group is None:
            raise RuntimeError(_ABANDONED)
        return [self._start(group, is_send, part)]

    @abstractmethod
    def _start(self, group: Any, is_send: bool, items: Sequence[Item]) -> Transfers:
        """Start sends or receives over the process group of one channel."""

    @abstractmethod
    def is_over(self, transfers: Transfers) -> bool:
        """Whether all transfers are complete or one has failed (``Transfers.error``).

        Does not wait.
        """

    def order(self, transfers: Transfers) -> bool:
        """Let the current CUDA stream, but not the host, wait for the transfers; return True.

        Sets ``Transfers.error`` after a failure. Without a GPU, has no effect and returns False.
        """
        return False

    @abstractmethod
    def wait(self, transfers: Transfers, watch: Callable[[], None]) -> None:
        """Wait until all transfers are complete or one has failed (``Transfers.error``).

        ``watch`` is called every 50 ms and may raise to end the wait.
        """

    @abstractmethod
    def stream_end(self) -> Callable[[Callable[[], None]], None]:
        """Return a function that waits for all work that is enqueued so far on the current CUDA
        stream. It takes ``watch``, as in ``wait``."""

    # ---- any thread -------------------------------------------------------------------------

    def abandon(self) -> None:
        """Abandon the process groups and their pending transfers. Does not wait."""
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
        """End process groups in the order of the list, without waiting; empty the list."""

    @abstractmethod
    def join(self, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` for the threads of an abandoned world to end.

        They must end before the process does.
        """


def listen_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Open a torch.distributed rendezvous store that listens on ``host``; port 0: a free port."""
    listener = socket.create_server((host, port))
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
