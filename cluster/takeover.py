"""A restarted controller actor finds the workers of the one before it and has them call.

    find the worker actors ─▶ open a control server ─▶ tell each worker of it, until it calls
        ─▶ ``Adoption`` collects what they say ─▶ the actor goes on with what was adopted

The workers serve meanwhile. It is tried until it is done; questions wait for the first outcome.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from cluster.adoption import Adopted, Adoption
from cluster.background import Background
from cluster.config import ClusterConfig
from cluster.control_frames import ControlFrame
from cluster.controller_settings import ControllerSettings
from cluster.worker_group_like import FoundWorker, WorkerGroupLike

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_FIND_LIMIT_S = 10.0
_REDIRECT_S = 0.5
_ADOPT_LIMIT_S = 60.0
_ADOPT_PAUSE_S = 1.0
_MAX_ADOPT_PAUSE_S = 10.0


class TakeoverHost(Protocol):
    """What a takeover needs of the controller actor."""

    def limits(self, config: ClusterConfig) -> ControllerSettings:
        """Limits of a controller with this configuration."""

    async def open_server(self, token: str) -> str:
        """Open a control server in place of any before; returns its address."""

    def is_connected(self, worker: str) -> bool:
        """Whether a worker has called there."""

    def take_over(self, found: Sequence[FoundWorker], adopted: Adopted) -> None:
        """Go on with the cluster as the workers have told it."""


class Takeover:
    """See the module. Event loop of the actor only."""

    def __init__(self, host: TakeoverHost, group: WorkerGroupLike, background: Background) -> None:
        """Nothing is to be done unless the actor was restarted; then ``adopt`` is called back."""
        self.failure = ""
        """Why the earlier controller's cluster is not known here; empty where it is, or was none"""
        self._host = host
        self._group = group
        self._background = background
        self._adoption: Adoption | None = None
        self._is_settled = asyncio.Event()  # this actor knows its cluster, or why it does not
        self.is_under_way = self._may_begin = group.was_restarted()
        """Workers may live that are not known yet."""
        if self._may_begin:
            group.call_back("adopt")
        else:
            self._is_settled.set()

    async def adopt(self) -> None:
        """Take over what an earlier controller left, if there was one.

        Returns when that is done, or has failed for the first time and is tried again.
        """
        if self._may_begin:
            self._may_begin = False
            self._background.spawn(self._adopt())
        await self._is_settled.wait()

    @property
    def listens(self) -> bool:
        """Frames of the workers are for ``frame`` and ``gone`` now."""
        return self._adoption is not None

    def frame(self, worker: str, frame: ControlFrame) -> None:
        """A worker sent a frame. Raises ``ProtocolError``."""
        assert self._adoption is not None
        self._adoption.frame(worker, frame, time.monotonic())

    def gone(self, worker: str) -> None:
        """A worker's connection closed."""
        assert self._adoption is not None
        self._adoption.gone(worker)

    async def _adopt(self) -> None:
        """Try until it is done: the workers serve meanwhile, and are found sooner or later."""
        pause_s = _ADOPT_PAUSE_S
        while True:
            try:
                async with asyncio.timeout(_ADOPT_LIMIT_S):
                    await self._find_and_adopt()
                break
            except Exception as err:  # whatever Ray raises
                logger.exception("the workers could not be adopted, try again")
                self.failure = f"the restarted controller failed: {type(err).__name__}: {err}"
                self._settle()  # who asks is told so
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_ADOPT_PAUSE_S)
        self.is_under_way = False
        self._settle()

    def _settle(self) -> None:
        self._is_settled.set()
        self._background.notify()

    async def _find_and_adopt(self) -> None:
        try:
            found = await self._group.find(_FIND_LIMIT_S)
            adopted = await self._call_workers(found) if found else None
        finally:
            self._adoption = None
        if adopted is None:
            self.failure = "the controller was lost before the cluster served"
            await self._group.end_all()
        else:
            self.failure = ""
            self._host.take_over(found, adopted)

    async def _call_workers(self, found: Sequence[FoundWorker]) -> Adopted | None:
        """Have all found workers connect here and tell where they stand."""
        limits = self._host.limits(found[0].config)
        address = await self._host.open_server(found[0].config.cluster_token)
        adoption = self._adoption = Adoption(
            [f.name for f in found],
            time.monotonic(),
            limit_s=limits.adoption_limit_s,
            confirm_s=limits.confirm_s,
        )
        for worker in found:
            self._background.spawn(self._redirect(worker.name, address, adoption))
        while not adoption.is_complete(time.monotonic()):
            await self._background.wait(lambda: adoption.is_complete(time.monotonic()), _POLL_S)
        return adoption.result()

    async def _redirect(self, name: str, address: str, adoption: Adoption) -> None:
        """Tell a worker where to call until it does, or nobody waits for it any more."""
        while self._adoption is adoption and not self._host.is_connected(name):
            try:
                await self._group.redirect(name, address)
            except Exception as err:  # whatever Ray raises: it may answer later, or be lost
                logger.warning("%s cannot be told of this controller: %s", name, err)
            await asyncio.sleep(_REDIRECT_S)
