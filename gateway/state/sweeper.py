"""Removes expired objects from the state folder while the gateway runs."""

from __future__ import annotations

import asyncio
import logging
import math

from cluster.disk.threads import END_S, DiskThreads
from gateway.core.errors import StorageError
from gateway.state.store import StateStore

logger = logging.getLogger(__name__)


class StateSweeper:
    """Removes expired objects at the start and then periodically. Errors are logged, not raised.

    Args:
        store: the store; None disables the sweeper.
        interval_s: seconds from the end of one sweep to the next.
    """

    def __init__(self, store: StateStore | None, interval_s: float) -> None:
        self._store = store
        self._interval_s = interval_s
        self._disk = DiskThreads("the sweep of the state folder", 1, 1, math.inf)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._store is not None:
            self._task = asyncio.create_task(self._run(self._store))

    async def stop(self) -> None:
        """Stop, and wait for the running sweep, at most ``END_S`` seconds."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=END_S)

    async def _run(self, store: StateStore) -> None:
        while True:
            try:
                if removed := await self._disk.run_to_completion(store.sweep):
                    logger.info("removed %d expired files from the state folder", removed)
            except StorageError as err:
                logger.error("could not sweep the state folder: %s", err)
            await asyncio.sleep(self._interval_s)
