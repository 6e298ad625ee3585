"""One torch.distributed world per generation, built and dropped without ever blocking for long.

Properties of gloo's send and receive that make the waiter thread here necessary: a
``wait`` that times out closes the connection, so a wait cannot be sliced; ``is_completed`` never
becomes true without one; ``abort`` does not end one. So a thread of the world waits in full, the
data thread watches it and the connections, and leaves an abandoned world and its buffers to it.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.core.errors import first_line
from workers.model.torch_private import (
    PrefixStore,
    Store,
    TCPStore,
    Work,
    coalesced,
    gloo_group,
    nccl_group,
)
from workers.transport.transport import Direction

Backend = Literal["gloo", "nccl"]
Channel = tuple[Direction, bool]
"""What is sent, and whether from a lower rank of the world to a higher one."""
ONE_WAY: tuple[Channel, ...] = (("rows", True), ("outputs", False))
"""Channels of two pools: attention ranks come first in the world."""
BOTH_WAYS: tuple[Channel, ...] = (*ONE_WAY, ("rows", False), ("outputs", True))
"""Channels of colocated workers."""

_POLL_S = 50e-6


@dataclass(slots=True)
class Transfer:
    """One send or receive under way."""

    rank: int
    """Rank in the other pool."""
    work: Work
    tensor: Tensor
    """Kept alive until the end."""


@dataclass(slots=True)
class TransferWait:
    """A wait for transfers."""

    transfers: Sequence[Transfer]
    num_done: int = 0
    """Transfers that are complete."""
    error: str = ""
    """Why the next transfer failed; empty if it did not."""
    finished: threading.Event = field(default_factory=threading.Event)
    """Set when the wait has ended, with or without an error."""


class World:
    """The process groups of one generation.

    Each channel has its own group, so that transfers of two channels cannot wait for each other on
    one CUDA stream. Within a channel the highest rank only sends or only receives, so it never
    waits for the others, nor, by induction, does the next one.
    """

    def __init__(
        self,
        groups: dict[Channel, Any],
        rank: int,
        backend: Backend,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._groups = groups
        self._rank = rank
        self._backend = backend
        self._device = device
        self._timeout = timedelta(seconds=timeout_s)
        self._queue: queue.SimpleQueue[TransferWait | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if backend == "gloo":
            self._thread = threading.Thread(target=self._wait_all, daemon=True, name="gloo-wait")
            self._thread.start()

    def transfer(
        self, direction: Direction, is_send: bool, items: Sequence[tuple[int, int, int, Tensor]]
    ) -> list[Transfer]:
        """Start sends or receives: (rank in the other pool, peer in the world, tag, tensor)."""
        started: list[Transfer] = []
        for is_up in (True, False):
            part = [item for item in items if ((item[1] > self._rank) == is_send) == is_up]
            if part:
                started += self._transfer(self._groups[direction, is_up], is_send, part)
        return started

    def _transfer(
        self, group: Any, is_send: bool, items: Sequence[tuple[int, int, int, Tensor]]
    ) -> list[Transfer]:
        call = group.send if is_send else group.recv
        if self._backend == "gloo":
            return [
                Transfer(r, call([tensor], peer, tag), tensor) for r, peer, tag, tensor in items
            ]

        def start() -> None:
            for _, peer, tag, tensor in items:
                call([tensor], peer, tag)

        work = coalesced(group, self._device, start)
        return [Transfer(r, work, tensor) for r, _, _, tensor in items]

    def wait(self, ticket: TransferWait, watch: Callable[[], None]) -> None:
        """Wait for transfers; ``watch`` is called every 50 ms and ends the wait by raising."""
        if self._backend == "gloo":
            self._queue.put(ticket)
            while not ticket.finished.wait(0.05):
                watch()
            return
        next_watch = time.monotonic() + 0.05
        while ticket.num_done < len(ticket.transfers):
            work = ticket.transfers[ticket.num_done].work
            if work.is_completed():
                work.wait()  # orders the current CUDA stream after it; does not block
                ticket.num_done += 1
                continue
            time.sleep(_POLL_S)
            if time.monotonic() >= next_watch:
                watch()
                next_watch = time.monotonic() + 0.05

    def abandon(self) -> None:
        """Give up the world and its transfers under way; returns at once."""
        groups, self._groups = self._groups, {}
        if self._backend == "nccl":
            for group in groups.values():
                group.abort()
        self._queue.put(None)  # the waiter drops the last references when it is free

    def join(self, timeout_s: float) -> None:
        """Wait for an abandoned world's thread: a process must not end while gloo is torn down."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _wait_all(self) -> None:
        while (ticket := self._queue.get()) is not None:
            try:
                for transfer in ticket.transfers:
                    transfer.work.wait(self._timeout)
                    ticket.num_done += 1
            except RuntimeError as err:
                ticket.error = first_line(err)
            ticket.finished.set()


def listen_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """The rendezvous store of an attention worker, on one interface; port 0 is a free one."""
    listener = socket.create_server((host, port))
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def build_world(
    *,
    store: Store,
    prefix: str,
    rank: int,
    size: int,
    channels: Sequence[Channel],
    backend: Backend,
    device: torch.device,
    host: str,
    connect_timeout_s: float,
    step_timeout_s: float,
) -> World:
    """Connect to all other members, which ``store`` names; blocks meanwhile.

    Collective: all members of the generation must call it.
    """
    groups: dict[Channel, Any] = {}
    if backend == "gloo":
        group = gloo_group(PrefixStore(prefix, store), rank, size, host, connect_timeout_s)
        groups = dict.fromkeys(channels, group)
    else:
        for direction, is_up in channels:
            name = f"{prefix}/{direction}-{'up' if is_up else 'down'}"
            group = nccl_group(PrefixStore(name, store), rank, size, step_timeout_s)
            # All ranks connect now: the first transfer may be between two ranks only.
            group.allreduce([torch.zeros(1, device=device)]).wait()
            torch.cuda.synchronize(device)
            groups[direction, is_up] = group
    return World(groups, rank, backend, device, step_timeout_s)
