"""World (process groups of one generation) over NCCL, for GPUs.

Transfers run on the CUDA stream of their group, after all work that was enqueued on the current
stream before they started. torch does not reuse their memory until they are complete. The current
stream waits for transfers once ``order`` is called or ``is_over`` has found them complete.
Communicators are nonblocking (``config.blocking = 0``), so that a communicator that is connecting,
or waiting for a dead peer, can be aborted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cluster.core.errors import first_line
from workers.model.torch_private import (
    PrefixStore,
    Store,
    Work,
    coalesced,
    connect_nccl_group,
    has_failed,
    nccl_group,
)
from workers.transport.world import WATCH_S, Item, Transfer, Transfers, World, WorldSetup

logger = logging.getLogger(__name__)

_POLL_S = 50e-6
_HEAD_START_S = 0.1
"""Seconds by which the abort of one process group precedes the next abort: NCCL first sets the flag
that ends the group's kernels, then waits for these kernels."""


class NcclWorld(World):
    """``World`` over NCCL, with one process group and so one communicator for each channel."""

    def __init__(self, setup: WorldSetup) -> None:
        super().__init__(setup)
        self._reapers: list[threading.Thread] = []

    def _connect(self, store: Store) -> None:
        setup = self.setup
        for channel in setup.channels:
            direction, is_up = channel
            name = f"{setup.prefix}/{direction}-{'up' if is_up else 'down'}"
            group = nccl_group(PrefixStore(name, store), setup.rank, setup.size)
            self._publish([channel], group)
            connect_nccl_group(group, setup.device)

    def _start(self, group: Any, is_send: bool, items: Sequence[Item]) -> Transfers:
        call = group.send if is_send else group.recv

        def start() -> None:
            for item in items:
                call([item.tensor], item.peer, item.tag)

        work = coalesced(group, start)
        return Transfers([Transfer(item.rank, work, item.tensor) for item in items])

    def is_over(self, transfers: Transfers) -> bool:
        try:
            while transfers.num_done < len(transfers.items):
                work = transfers.items[transfers.num_done].work
                if not work.is_completed():
                    return False
                _order_after(work)
                transfers.num_done += 1
        except RuntimeError as err:
            transfers.error = first_line(err)
        return True

    def order(self, transfers: Transfers) -> bool:
        """Let the current CUDA stream, but not the host, wait for the transfers; return True.

        Work that is enqueued later may reuse the memory of the transfers. Sets ``error`` of the
        transfers if NCCL reports an error.
        """
        try:
            works = {id(transfer.work): transfer.work for transfer in transfers.items}
            for work in works.values():  # transfers that started together share one
                _order_after(work)
            for transfer in transfers.items:
                transfer.tensor = None
        except RuntimeError as err:
            transfers.error = first_line(err)
        return True

    def wait(self, transfers: Transfers, watch: Callable[[], None]) -> None:
        _poll(lambda: self.is_over(transfers), watch)

    def stream_end(self) -> Callable[[Callable[[], None]], None]:
        """Return a function that waits for all work that is enqueued so far on the current CUDA
        stream, without blocking in CUDA: the stream may wait for a lost peer."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return partial(_poll, event.query)

    def _drop(self, groups: list[Any]) -> None:
        """Abort each group, in order, on a thread of its own that also runs the group's destructor.

        Sequential aborts can deadlock (pytorch#119797): an abort may wait for all kernels of the
        device, and kernels of another communicator end only when the other communicator is aborted.
        NCCL's ``_group_start`` does not help: it applies to one thread, and torch runs each abort
        on another thread.
        """
        earlier: list[threading.Thread] = []
        while groups:
            reaper = threading.Thread(
                target=_abort, args=(groups.pop(0), tuple(earlier)), daemon=True, name="nccl-abort"
            )
            earlier.append(reaper)
            self._reapers.append(reaper)
            reaper.start()

    def join(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for reaper in self._reapers:
            reaper.join(max(0.0, deadline - time.monotonic()))


def _poll(is_over: Callable[[], bool], watch: Callable[[], None]) -> None:
    next_watch = time.monotonic() + WATCH_S
    while not is_over():
        time.sleep(_POLL_S)
        if time.monotonic() >= next_watch:
            watch()
            next_watch = time.monotonic() + WATCH_S


def _order_after(work: Work) -> None:
    """Make the current CUDA stream, not the host, wait for ``work``.

    Raises ``RuntimeError`` if NCCL reports an error.
    """
    if has_failed(work):
        raise RuntimeError("NCCL reports an error of the connection")
    work.wait()  # does not block: the world has no blocking waits


def _abort(group: Any, earlier: Sequence[threading.Thread]) -> None:
    """Abort a process group, after waiting up to ``_HEAD_START_S`` for the ``earlier`` aborts."""
    deadline = time.monotonic() + _HEAD_START_S
    for reaper in earlier:
        reaper.join(max(0.0, deadline - time.monotonic()))
    try:
        group.abort()
    except RuntimeError as err:
        logger.warning("could not abort an NCCL group: %s", first_line(err))
