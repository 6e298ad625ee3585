"""Handoff to a restarted controller actor: it finds the workers and collects their reports.

    claim a term ─▶ find the worker actors ─▶ open a control server ─▶ send each worker its address
        until it calls ─▶ ``ReportCollector`` collects the reports ─▶ the actor continues with the
        collected state

The workers serve meanwhile. Failed attempts are repeated, under the same term; calls wait for the
first outcome. Workers refuse the address of a controller when one with a higher term has called.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from cluster.actors.tasks import Background
from cluster.actors.worker_group_like import FoundWorker, WorkerGroupLike
from cluster.controller.failover.collect import CollectedState, ReportCollector
from cluster.controller.parts.settings import ControllerSettings
from cluster.core.errors import SupersededError

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_FIND_LIMIT_S = 10.0
_REDIRECT_S = 0.5
_RESTORE_LIMIT_S = 60.0
_RESTORE_PAUSE_S = 1.0
_MAX_RESTORE_PAUSE_S = 10.0


class HandoffHost(Protocol):
    """What a handoff needs of the controller actor."""

    identity: str
    """Distinguishes controllers of one term."""

    async def open_server(self, token: str) -> str:
        """Open a control server in place of an earlier one; returns its address."""

    def is_connected(self, worker: str) -> bool:
        """Whether a worker has called there."""

    def continue_with(self, found: Sequence[FoundWorker], collected: CollectedState) -> None:
        """Continue with the workers' state."""

    def retire(self, reason: str) -> None:
        """Another controller leads the workers: let go of them."""


class Handoff:
    """Finds and collects. Event loop of the actor only."""

    def __init__(self, host: HandoffHost, group: WorkerGroupLike, background: Background) -> None:
        """Does nothing unless the actor was restarted; then Ray calls ``restore``."""
        self.failure = ""
        """Why the earlier cluster is unknown; empty if it is known or never existed."""
        self._host = host
        self._group = group
        self._background = background
        self._term = 0
        """Claimed once: a handoff that another controller overtakes must not overtake it again."""
        self._superseded: SupersededError | None = None
        self.collector: ReportCollector | None = None
        """Gets the workers' frames during a collection; None otherwise."""
        self._is_settled = asyncio.Event()  # the cluster is known, or why it is not
        self.is_under_way = self._may_begin = group.was_restarted()
        """Workers may live that this actor does not know yet."""
        if self._may_begin:
            group.call_back("restore")
        else:
            self._is_settled.set()

    async def restore(self) -> None:
        """As ``ControllerActor.restore``."""
        if self._may_begin:
            self._may_begin = False
            self._background.spawn(self._restore())
        await self._is_settled.wait()

    async def _restore(self) -> None:
        """Repeat until it succeeds: the workers serve meanwhile."""
        pause_s = _RESTORE_PAUSE_S
        while True:
            try:
                async with asyncio.timeout(_RESTORE_LIMIT_S):
                    await self._find_and_restore()
                break
            except SupersededError as err:
                self._host.retire(str(err))
                break
            except Exception as err:  # any error of Ray
                logger.exception("the workers could not be found, trying again")
                self.failure = f"the restarted controller failed: {type(err).__name__}: {err}"
                self._settle()  # waiting calls get the failure
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_RESTORE_PAUSE_S)
        self.is_under_way = False
        self._settle()

    def _settle(self) -> None:
        self._is_settled.set()
        self._background.notify()

    async def _find_and_restore(self) -> None:
        if not self._term:
            self._term = await self._group.claim(1, self._host.identity)
        try:
            found = await self._group.find(_FIND_LIMIT_S)
            collected = await self._call_workers(found) if found else None
        finally:
            self.collector = None
        if collected is None:
            self.failure = "the controller was lost before the cluster served"
            await self._group.end_all()
        else:
            self.failure = ""
            self._host.continue_with(found, replace(collected, term=self._term))

    async def _call_workers(self, found: Sequence[FoundWorker]) -> CollectedState | None:
        """Make all found workers connect here and report."""
        limits = ControllerSettings.of(found[0].config)
        address = await self._host.open_server(found[0].config.cluster_token)
        collector = self.collector = ReportCollector(
            [f.name for f in found],
            time.monotonic(),
            limit_s=limits.collect_limit_s,
            confirm_s=limits.confirm_s,
            silent=self._group.silent,
            fresh=[f.name for f in found if not f.has_called],
        )
        for worker in found:
            self._background.spawn(self._redirect(worker.name, address, collector))
        while not collector.is_complete(time.monotonic()):
            await self._background.wait(lambda: collector.is_complete(time.monotonic()), _POLL_S)
            if self._superseded is not None:
                raise self._superseded
        return collector.result()

    async def _redirect(self, name: str, address: str, collector: ReportCollector) -> None:
        """Send a worker the address until it calls or is no longer awaited."""
        while self.collector is collector and not self._host.is_connected(name):
            try:
                await self._group.redirect(name, address)
            except SupersededError as err:
                self._superseded = err
                return
            except Exception as err:  # any error of Ray: it may answer later, or be lost
                logger.warning("%s cannot be sent the address of this controller: %s", name, err)
            await asyncio.sleep(_REDIRECT_S)
