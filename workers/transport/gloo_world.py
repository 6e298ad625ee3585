"""World (process groups of one generation) over gloo, for CPUs.

Waiter threads wait for gloo's sends and receives with the full time limit, while the data thread
watches these threads and the connections. The data thread cannot wait for gloo itself: a ``wait``
that times out closes the connection, so a wait cannot be split into short ones; ``is_completed``
never becomes true without a ``wait``; ``abort`` does not end a ``wait``. The threads own an
abandoned world's buffers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from cluster.core.errors import first_line
from workers.model.torch_private import PrefixStore, Store, gloo_group
from workers.transport.world import WATCH_S, Item, Transfer, Transfers, World, WorldSetup


class GlooWorld(World):
    """``World`` over gloo. One process group serves all channels, as gloo's transfers do not block
    each other."""

    def __init__(self, setup: WorldSetup) -> None:
        super().__init__(setup)
        limit = timedelta(seconds=setup.step_timeout_s)
        self._waiters = {True: _Waiter(limit, "gloo-sends"), False: _Waiter(limit, "gloo-receives")}

    def _connect(self, store: Store) -> None:
        setup = self.setup
        prefixed = PrefixStore(setup.prefix, store)
        group = gloo_group(prefixed, setup.rank, setup.size, setup.host, setup.connect_timeout_s)
        self._publish(setup.channels, group)

    def _start(self, group: Any, is_send: bool, items: Sequence[Item]) -> Transfers:
        call = group.send if is_send else group.recv
        transfers = Transfers(
            [Transfer(i.rank, call([i.tensor], i.peer, i.tag), i.tensor) for i in items]
        )
        self._waiters[is_send].put(transfers)
        return transfers

    def is_over(self, transfers: Transfers) -> bool:
        return transfers.finished.is_set()

    def wait(self, transfers: Transfers, watch: Callable[[], None]) -> None:
        while not transfers.finished.wait(WATCH_S):
            watch()

    def stream_end(self) -> Callable[[Callable[[], None]], None]:
        """Return a function that does nothing: without a GPU there is no stream."""
        return lambda watch: None

    def _drop(self, groups: list[Any]) -> None:
        groups.clear()
        for waiter in self._waiters.values():
            waiter.put(None)  # the thread drops the last references after its current wait

    def join(self, timeout_s: float) -> None:
        for waiter in self._waiters.values():
            waiter.join(timeout_s)


class _Waiter:
    """A thread that waits for transfers in the order in which they were started."""

    def __init__(self, limit: timedelta, name: str) -> None:
        self._limit = limit
        self._queue: queue.SimpleQueue[Transfers | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)
        self._thread.start()

    def put(self, transfers: Transfers | None) -> None:
        """Queue transfers to wait for, or None to end the thread."""
        self._queue.put(transfers)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (transfers := self._queue.get()) is not None:
            try:
                for transfer in transfers.items:
                    transfer.work.wait(self._limit)
                    transfers.num_done += 1
            except RuntimeError as err:
                transfers.error = first_line(err)
            transfers.finished.set()
