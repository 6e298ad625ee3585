"""Select loop of a worker's data-plane sockets. There is no I/O thread."""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from cluster.core.errors import PeerLostError
from workers.transport.acceptor import Acceptor, Pending
from workers.transport.edge import Edge
from workers.transport.edge_table import EdgeTable
from workers.transport.path_watch import LOOK_S

_DRAIN_ROUNDS = 100


class SelectLoop:
    """Waits for the worker's data-plane sockets on the data thread, and handles the ready ones."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        table: EdgeTable,
        acceptor: Acceptor,
        check: Callable[[], None],
        step_timeout_s: float,
    ) -> None:
        """``check`` raises an error if waits must end. ``step_timeout_s``: limit of ``wait``."""
        self._selector = selector
        self._table = table
        self._acceptor = acceptor
        self._check = check
        self._step_timeout_s = step_timeout_s
        self._look_at = 0.0
        self.awaited: tuple[str, ...] = ()
        """Names of the workers for which the data thread waits at present; empty if it waits for
        none. Any thread may read this field."""

    @contextlib.contextmanager
    def awaiting(self, *names: str) -> Iterator[None]:
        """Context in which ``awaited`` has the names of workers for which the data thread waits."""
        self.awaited = names
        try:
            yield
        finally:
            self.awaited = ()

    def wait(
        self,
        ready: Callable[[], bool],
        missing: Callable[[], list[str]],
        *,
        timeout_s: float | None = None,
        what: str = "no answer",
        slice_s: float = 3600.0,
    ) -> None:
        """Run the loop until ``ready()`` returns True.

        ``missing``: returns the names of the workers waited for. ``timeout_s``: None for the step
        timeout. ``what``: text of the error. ``slice_s``: longest time between two calls of
        ``ready``. Raises ``PeerLostError`` for the first missing worker after the timeout, and the
        errors of ``check``.
        """
        limit = self._step_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        with self.awaiting():
            while True:
                self._check()
                if ready():
                    return
                left = deadline - time.monotonic()
                self.awaited = tuple(missing())
                if left <= 0:
                    raise timed_out(self.awaited, f"{what} within {limit:g} s")
                self.run_once(min(left, slice_s))

    def poll(self, timeout_s: float = 0.0) -> None:
        """Wait for sockets once, for at most ``timeout_s``, and handle the ready ones.

        Raises ``GenerationChangedError`` or ``PeerLostError`` if waits must end.
        """
        self._check()
        self.run_once(timeout_s)
        self._check()

    def drain(self) -> None:
        """Read all data that has arrived, to detect broken edges. Does not wait."""
        for _ in range(_DRAIN_ROUNDS):
            if not self.run_once(0.0):
                return

    def run_once(self, timeout_s: float) -> int:
        """Wait for sockets once, for at most ``timeout_s``, and handle the ready ones.

        Unlike ``poll``, it does not call ``check``. Returns the number of ready sockets.
        """
        return self._run_once(timeout_s, ())[0]

    def poll_edges(self, timeout_s: float, kept: Collection[Edge]) -> list[Edge]:
        """Do as ``poll``, but do not read ``kept`` edges; return those that have data to read."""
        self._check()
        _, readable = self._run_once(timeout_s, kept)
        self._check()
        return readable

    def _run_once(self, timeout_s: float, kept: Collection[Edge]) -> tuple[int, list[Edge]]:
        deadline, readable = self._acceptor.next_deadline, list[Edge]()
        if deadline is not None:
            timeout_s = min(timeout_s, max(deadline - time.monotonic(), 0.0))
        if not self._table.is_settled:
            timeout_s = min(timeout_s, LOOK_S)
        events = self._selector.select(timeout_s)
        for key, mask in events:
            if isinstance(key.data, Edge):
                if mask == selectors.EVENT_READ and key.data in kept:
                    readable.append(key.data)
                else:
                    self._table.serve(key.data, mask)
            elif isinstance(key.data, Pending):
                self._acceptor.advance(key.data)
            else:
                key.data()
        if deadline is not None:
            self._acceptor.expire()
        self.look()
        return len(events), readable

    def look(self) -> None:
        """Check all edges for dead network paths if ``LOOK_S`` has elapsed since the last check."""
        if not self._table.is_settled and (now := time.monotonic()) >= self._look_at:
            self._look_at = now + LOOK_S
            self._table.look(now)


def timed_out(missing: Sequence[str], reason: str) -> PeerLostError:
    """Return a ``PeerLostError`` for the first missing worker; its reason names the other ones."""
    others = f" (nor from {', '.join(missing[1:])})" if len(missing) > 1 else ""
    return PeerLostError(missing[0] if missing else "a peer", reason + others)
