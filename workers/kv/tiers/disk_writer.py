"""The thread that opens the disk tier, writes turns to it, and deletes its files.

    opening ─▶ open ─▶ identity named ─▶ in use: turns are written, items may be read
       └─ an error: another try after ``RETRY_S``; the worker serves without the tier

All calls into the file system but reads of items are made here, so that a disk that hangs holds up
this thread alone.
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
from workers.kv.tiers.order import TierTurn
from workers.kv.turns import TurnUse

logger = logging.getLogger(__name__)

MAX_WAITING = 256
"""Turns that may wait for the disk; the oldest are left out first."""
RETRY_S = 60.0
"""Time between two tries to open the disk, and between two looks for abandoned folders."""
SLOW_S = 10.0
"""Time in one operation of the disk after which the worker reports it."""
_STOP_S = 5.0


def no_sweep() -> None:
    """There are no folders of others."""


class DiskWriter:
    """See the module. Any thread may call the methods; none but ``close`` and the waits waits.

    Args:
        host: has the bytes of turns.
        open_disk: opens the tier. Raises ``OSError``, and ``ConfigError`` where it never can be.
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
        """The tier, while it is in use."""
        self._opened: DiskTier | None = None
        self._error: Exception | None = None
        """Why the last try to open it failed."""
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
        """Why blocks are not kept on disk, for people; empty if they are."""
        since_s, opened = self._busy_since_s, self._opened
        if opened is None and self._error is not None:
            return str(self._error)
        if since_s is not None and self._clock() - since_s >= SLOW_S:
            return f"the disk has not answered for {SLOW_S:g} s"
        return "" if opened is None else opened.failure

    def wait_opened(self, timeout_s: float) -> None:
        """Wait until the first try to open the disk has ended, or the time is over.

        Raises ``ConfigError`` where the disk can never be opened as configured.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_tries, timeout_s)
            if isinstance(self._error, ConfigError):
                raise self._error

    def use(self, identity: str) -> None:
        """What blocks are computed with from now on: items of another identity are deleted."""
        with self._changed:
            self._identity = identity
            self._changed.notify_all()

    def put(self, use: TurnUse) -> None:
        """Copy the blocks of a turn to disk, after those that wait."""
        with self._changed:
            if self._opened is None and self._num_tries:
                return  # there is no disk now
            if len(self._waiting) == MAX_WAITING:
                skipped = self._waiting.popleft()
                if self._opened is not None:
                    self._opened.num_skipped += len(skipped.names)
            self._waiting.append(use)
            self._changed.notify_all()

    def forget(self, names: Collection[bytes]) -> None:
        """These items, which host memory has forgotten, must not be read from the disk any more."""
        self._num_forgets += 1  # after host memory, before the disk: see _copy
        with self._changed:
            if self.disk is None:  # it may find them in its folder
                self._forgotten.update(names)
            else:
                self.disk.forget(names)
            self._num_forgets += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Write no more; the turn under way is cut short."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(_STOP_S)
        # A thread that is alive may write yet: the folder stays its own.
        if not self._thread.is_alive() and self._opened is not None:
            self._opened.close()

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do; False where it takes longer. For tests."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._busy_since_s is None and not self._has_work(), timeout_s
            )

    def wait_usable(self, timeout_s: float) -> bool:
        """Wait until the disk is in use; False where it takes longer. For tests."""
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
                self._go_on(self._opened)
            except Exception:  # memory that is missing, for example: the next turn is written
                logger.exception("KV blocks are not written to disk")

    def _try_open(self) -> DiskTier | None:
        before, self._error = self._error, None
        try:
            return self._open_disk()
        except Exception as err:
            self._error = err
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
        """Wait for something to do; False: the end."""
        with self._changed:
            self._end_operation()
            left_s = max(self._sweep_at_s - self._clock(), 0.0)
            self._changed.wait_for(lambda: self._has_work() or self._is_closed, left_s)
            if not self._is_closed:
                self._busy_since_s = self._clock()
            return not self._is_closed

    def _go_on(self, disk: DiskTier) -> None:
        """Take the identity, delete what was forgotten, and write the next turn, oldest first."""
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
            logger.warning("abandoned KV blocks on disk are not deleted: %s", err)

    def _write(self, disk: DiskTier, turn: TierTurn) -> None:
        """Copy what the disk lacks of a turn's blocks, as far as host memory has them."""
        for name, parent in turn.use.items:
            if self._is_closed or not (disk.has(name) or self._copy(disk, turn, name, parent)):
                break

    def _copy(self, disk: DiskTier, turn: TierTurn, name: bytes, parent: bytes | None) -> bool:
        num_forgets = self._num_forgets
        data = self._host.read(name)
        # Bytes that host memory had before this look were not computed with a newer identity.
        if data is None or self._identity != self._used_identity:
            return False
        if not disk.put(turn, name, parent, data):
            return False
        if self._num_forgets != num_forgets:  # this one, maybe, before it was on disk
            disk.forget((name,))
            return False
        return True
