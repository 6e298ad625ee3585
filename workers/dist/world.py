"""One torch.distributed world per generation, built and dropped without ever blocking for long.

What was learned of gloo's send and receive, and is the reason for the waiter thread here: a
``wait`` that times out closes the connection, so a wait cannot be sliced; ``is_completed`` never
becomes true without one; ``abort`` does not end one. So a thread of the world waits in full, the
data thread watches it and the hub, and leaves an abandoned world to that thread with its buffers.
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
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore, Work

from workers.dist.transport import Direction

Backend = Literal["gloo", "nccl"]
Lane = tuple[Direction, bool]
"""What moves, and whether from a lower rank of the world to a higher one."""
ONE_WAY: tuple[Lane, ...] = (("rows", True), ("outputs", False))
"""Lanes of two pools: attention ranks come first in the world."""
BOTH_WAYS: tuple[Lane, ...] = (*ONE_WAY, ("rows", False), ("outputs", True))
"""Lanes of colocated workers."""

_POLL_S = 50e-6


@dataclass(slots=True)
class Transfer:
    """One send or receive under way."""

    rank: int
    """Rank in the other pool."""
    work: Work
    """torch's handle."""
    tensor: Tensor
    """Kept alive until the end."""


@dataclass(slots=True)
class Ticket:
    """A wait that was handed to the waiter."""

    transfers: Sequence[Transfer]
    """What is waited for, in order."""
    num_done: int = 0
    """Transfers that are complete."""
    error: str = ""
    """Why the next one failed; empty if it did not."""
    finished: threading.Event = field(default_factory=threading.Event)
    """Set at the end, good or bad."""


class World:
    """The process groups of one generation: one for each lane, so that none can wait for another
    crosswise on one CUDA stream. Within a lane the highest rank only sends or only receives, so it
    never waits for the others there, nor then does the next one.
    """

    def __init__(
        self,
        groups: dict[Lane, Any],
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
        self._queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
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
        """Start what goes through one group."""
        call = group.send if is_send else group.recv
        if self._backend == "gloo":
            return [
                Transfer(r, call([tensor], peer, tag), tensor) for r, peer, tag, tensor in items
            ]
        group._start_coalescing(self._device)
        for _, peer, tag, tensor in items:
            call([tensor], peer, tag)
        work = group._end_coalescing(self._device)
        return [Transfer(r, work, tensor) for r, _, _, tensor in items]

    def wait(self, ticket: Ticket, watch: Callable[[], None]) -> None:
        """Wait for transfers; ``watch`` is called every 50 ms and leaves by raising."""
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
        """Give up the world, whatever is under way; returns at once."""
        groups, self._groups = self._groups, {}
        if self._backend == "nccl":
            for group in groups.values():
                group.abort()
        self._queue.put(None)  # the waiter drops the last references when it comes free

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
                ticket.error = str(err).splitlines()[0]
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
    lanes: Sequence[Lane],
    backend: Backend,
    device: torch.device,
    host: str,
    connect_timeout_s: float,
    step_timeout_s: float,
) -> World:
    """Meet the other members at ``store`` and connect to all of them; blocks meanwhile.

    Collective: all members of the generation must call it.
    """
    groups: dict[Lane, Any] = {}
    if backend == "gloo":
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=connect_timeout_s)
        group = gloo(PrefixStore(prefix, store), rank, size, options)
        groups = dict.fromkeys(lanes, group)
    else:
        nccl: Any = dist.ProcessGroupNCCL
        for direction, is_up in lanes:
            options = nccl.Options()
            options._timeout = timedelta(seconds=step_timeout_s)
            name = f"{prefix}/{direction}-{'up' if is_up else 'down'}"
            group = nccl(PrefixStore(name, store), rank, size, options)
            # Connect now, with everyone: the first transfer may be between two ranks only.
            group.allreduce([torch.zeros(1, device=device)]).wait()
            torch.cuda.synchronize(device)
            groups[direction, is_up] = group
    return World(groups, rank, backend, device, step_timeout_s)
