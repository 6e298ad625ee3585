"""Follows the table of models, and orders its changes. Independent of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.core.codec import from_plain
from cluster.core.errors import ExpertMeshError, NotReadyError
from cluster.core.model_table import ModelTable, RevisionState

logger = logging.getLogger(__name__)

_FIND_S = 5.0
"""Seconds between two searches for the actor that keeps the table. It starts after the gateways."""
_RETRY_S = 2.0
"""Seconds before a table is applied again if that was not possible wholly."""
_POLL_S = 5.0
_FAST_POLL_S = 0.3
"""Timeout of a poll in seconds while a revision waits for the end of calls."""
_CALL_LIMIT_S = 5.0
LOAD_LIMIT_S = 180.0
"""Time limit in seconds of the check and the download of a checkpoint."""


class TableCalls(Protocol):
    """Calls the actor that keeps the table, ``cluster.launch.models_actor.ModelsActor``."""

    async def call(self, method: str, /, *details: Any, **named: Any) -> Any:
        """Call a method and return its plain data. Raises the method's errors, or any error if the
        actor cannot be reached."""


@dataclass(slots=True)
class TableFollower:
    """Keeps the gateways of a replica up to date with the table of models.

    Args:
        find: finds the actor; raises if there is none.
        name: name of this replica.
        calls: returns the number of calls that run on each fleet.
        apply: changes the gateways of the replica. Only when it has returned, the actor learns
            that this replica knows the table. It returns False if it should be called again.
    """

    find: Callable[[], Awaitable[TableCalls]]
    name: str
    calls: Callable[[], Mapping[str, int]]
    apply: Callable[[ModelTable], Coroutine[Any, Any, bool]]
    table: ModelTable | None = None
    """The latest table that was applied; None before the first."""
    _actor: TableCalls | None = None
    _retry_at_s: float = math.inf
    """Monotonic time at which the latest table is applied again."""
    _task: asyncio.Task[None] | None = field(default=None)

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def order(self, method: str, *details: Any, **named: Any) -> ModelTable:
        """Call a method that changes the table; return the table.

        Raises the method's errors, and ``NotReadyError`` if the actor does not respond.
        """
        limit_s = LOAD_LIMIT_S if method == "load" else _CALL_LIMIT_S
        try:
            async with asyncio.timeout(limit_s):
                actor = self._actor or await self.find()
                found = await actor.call(method, *details, **named)
        except ExpertMeshError:
            raise
        except Exception as err:  # there is no actor yet, or Ray failed
            raise NotReadyError("the table of models cannot be changed now") from err
        return from_plain(found, ModelTable)

    async def _follow(self) -> None:
        while True:
            try:
                found = await self._poll(self._timeout_s)
                if found is None and time.monotonic() >= self._retry_at_s:
                    found = self.table
                if found is not None:
                    await self._apply(found)
            except Exception as err:  # the actor starts late, and may restart
                level = logging.DEBUG if self._actor is None else logging.WARNING
                logger.log(level, "the table of models is not followed: %r", err)
                self._actor = None
                await asyncio.sleep(_FIND_S)

    async def _poll(self, timeout_s: float) -> ModelTable | None:
        """Report this replica's calls; return a table that it does not know, None after a time."""
        self._actor = self._actor or await self.find()
        version = 0 if self.table is None else self.table.version
        call = self._actor.call("wait_table", version, timeout_s, self.name, dict(self.calls()))
        found = await asyncio.wait_for(call, timeout_s + _CALL_LIMIT_S)
        return None if found is None else from_plain(found, ModelTable)

    async def _apply(self, table: ModelTable) -> None:
        """Apply a table; report this replica's calls meanwhile, if the actor is not away."""
        applying = asyncio.create_task(self.apply(table))
        try:
            while not (await asyncio.wait([applying], timeout=_POLL_S))[0]:
                with contextlib.suppress(Exception):
                    await self._poll(0.0)
        finally:
            applying.cancel()
        self._retry_at_s = math.inf if applying.result() else time.monotonic() + _RETRY_S
        self.table = table

    @property
    def _timeout_s(self) -> float:
        waits = (RevisionState.WAITING, RevisionState.RETIRING)
        is_waiting = self.table is not None and any(r.state in waits for _, r in self.table)
        timeout_s = _FAST_POLL_S if is_waiting else _POLL_S
        return timeout_s if self._retry_at_s == math.inf else min(timeout_s, _RETRY_S)
