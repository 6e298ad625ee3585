"""Thread that opens the disk tier, writes turns to it and deletes files.

    opening ─▶ open ─▶ identity set ─▶ in use: turns are written, items may be read
       └─ error: retry after ``RETRY_S``; the worker serves without the tier

Only this thread accesses the file system, except for reads of items. A disk that hangs therefore
blocks no other thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from cluster.core.errors import ConfigError
from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.index import TierTurn
from workers.kv.turns import TurnUse

logger = logging.getLogger(__name__)

MAX_WAITING = 256
"""Limit of turns that wait for the disk; the oldest ones are skipped first."""
RETRY_S = 60.0
"""Interval between tries to open the disk, and between sweeps of abandoned folders."""
SLOW_S = 10.0
"""Duration of one disk operation after which the worker reports a problem."""
_STOP_S = 5.0


def no_sweep() -> None:
    """Default ``sweep``, which deletes nothing."""


class DiskWriter:
    """Opens and writes the disk tier on its own thread.

    Any thread may call the methods. Only ``close`` and the ``wait_`` methods block.

    Args:
        host: tier in host memory, from which the blocks of turns are copied.
        open_disk: opens the tier. Raises ``OSError``, or ``ConfigError`` if it can never be opened.
        sweep: deletes abandoned folders. Raises ``OSError``.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        host: HostTier,
        open_disk: Callable[[], DiskTier],
        sweep: Callable[[], object] = no_sweep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._open_disk = open_disk
        self._sweep = sweep
        self._clock = clock
        self.disk: DiskTier | None = None
        """The tier once its identity is set; None before."""
        self._opened: DiskTier | None = None
        self._error: Exception | None = None
        """Error of the last failed try to open the tier."""
        self._identity: str | None = None
        self._used_identity: str | None = None
        self._waiting: deque[TurnUse] = deque()
        self._changed = threading.Condition()
        self._num_tries = 0
        self._busy_since_s: float | None = clock()
        self._sweep_at_s = 0.0
        self._is_closed = False
        self._num_forgets = 0
        self._forgotten: set[bytes] = set()
        self._thread = threading.Thread(target=self._run, name="kv-disk-writer", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Reason why blocks are not stored on disk, as text; empty without a problem."""
        since_s, opened, error = self._busy_since_s, self._opened, self._error
        if since_s is not None and self._clock() - since_s >= SLOW_S:
            return f"the disk has not answered for {SLOW_S:g} s"
        if opened is None:
            return "" if error is None else str(error)
        return opened.failure

    def wait_opened(self, timeout_s: float) -> None:
        """Wait until the first try to open the disk has ended, or ``timeout_s`` has elapsed.

        Raises ``ConfigError`` if the disk can never be opened as configured.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_tries, timeout_s)
            if isinstance(self._error, ConfigError):
                raise self._error

    def use(self, identity: str) -> None:
        """Set the identity of new blocks (``workers.kv.tiers.disk``); delete items with another."""
        with self._changed:
            self._identity = identity
            self._changed.notify_all()

    def put(self, use: TurnUse) -> None:
        """Queue the blocks of a turn to be copied to disk; ignored without an open disk."""
        with self._changed:
            if self._opened is None and self._num_tries:
                return  # there is no disk now
            if len(self._waiting) == MAX_WAITING:
                skipped = self._waiting.popleft()
                if self._opened is not None:
                    self._opened.skip(skipped)
            self._waiting.append(use)
            self._changed.notify_all()

    def forget(self, names: Collection[bytes]) -> None:
        """Forget items on the disk. Host memory must have forgotten them before."""
        self._num_forgets += 1  # after host memory, before the disk: see _copy
        with self._changed:
            if self.disk is None:  # its folder may contain them
                self._forgotten.update(names)
            else:
                self.disk.forget(names)
            self._num_forgets += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop writing, even within a turn, and close the tier."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(_STOP_S)
        # A thread that is still alive may still write, so the folder stays locked.
        if not self._thread.is_alive() and self._opened is not None:
            self._opened.close()

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until no work is left; False after ``timeout_s``. For tests."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._busy_since_s is None and not self._has_work(), timeout_s
            )

    def wait_usable(self, timeout_s: float) -> bool:
        """Wait until the disk is in use; False after ``timeout_s``. For tests."""
        with self._changed:
            return self._changed.wait_for(lambda: self.disk is not None, timeout_s)

    # The thread

    def _run(self) -> None:
        while self._opened is None:
            opened = self._try_open()
            with self._changed:
                self._opened = opened
                self._num_tries += 1
                self._end_operation()
                if opened is None and self._changed.wait_for(lambda: self._is_closed, RETRY_S):
                    return
                self._busy_since_s = self._clock()
        while self._wait():
            try:
                self._work_once(self._opened)
            except Exception:  # out of memory, for example: continue with the next turn
                logger.exception("could not write KV blocks to disk")

    def _try_open(self) -> DiskTier | None:
        try:
            return self._open_disk()
        except Exception as err:
            before, self._error = self._error, err
            if not isinstance(err, (OSError, ConfigError)):
                logger.exception("KV blocks are not kept on disk")
            elif str(err) != str(before):
                logger.warning("KV blocks are not kept on disk: %s", err)
            return None

    def _end_operation(self) -> None:
        self._busy_since_s = None
        self._changed.notify_all()

    def _has_work(self) -> bool:
        if self._opened is None or self._identity is None:
            return False
        is_changed = self._identity != self._used_identity
        return bool(is_changed or self._waiting or self._opened.num_unerased)

    def _wait(self) -> bool:
        """Wait for work; False if the writer is closed."""
        with self._changed:
            self._end_operation()
            left_s = max(self._sweep_at_s - self._clock(), 0.0)
            self._changed.wait_for(lambda: self._has_work() or self._is_closed, left_s)
            if not self._is_closed:
                self._busy_since_s = self._clock()
            return not self._is_closed

    def _work_once(self, disk: DiskTier) -> None:
        """Apply the latest ``use``, delete forgotten items, write the oldest turn, sweep if due."""
        with self._changed:
            identity = self._identity
        if identity is not None and identity != self._used_identity:
            disk.use(identity)
            with self._changed:
                disk.forget(self._forgotten)
                self._forgotten.clear()
                self._used_identity, self.disk = identity, disk
                self._changed.notify_all()
            self._sweep_at_s = 0.0
        disk.erase()
        with self._changed:
            use = self._waiting.popleft() if self._waiting and identity is not None else None
        if use is not None:
            turn = disk.begin(use)
            try:
                self._write(disk, turn)
            finally:
                disk.end(turn)
        if self._clock() >= self._sweep_at_s:
            self._sweep_at_s = self._clock() + RETRY_S
            self._try_sweep()

    def _try_sweep(self) -> None:
        try:
            self._sweep()
        except OSError as err:
            logger.warning("could not delete abandoned KV blocks on disk: %s", err)

    def _write(self, disk: DiskTier, turn: TierTurn) -> None:
        """Copy a turn's blocks that the disk lacks, up to the first one missing in host memory."""
        for name, parent in turn.use.items:
            if self._is_closed or not (disk.has(name) or self._copy(disk, turn, name, parent)):
                break

    def _copy(self, disk: DiskTier, turn: TierTurn, name: bytes, parent: bytes | None) -> bool:
        num_forgets = self._num_forgets
        data = self._host.read(name)
        # Data that was read before this check was not computed with a newer identity.
        if data is None or self._identity != self._used_identity:
            return False
        if not disk.put(turn, name, parent, data):
            return False
        if self._num_forgets != num_forgets:  # perhaps this item, before it was on disk
            disk.forget((name,))
            return False
        return True
