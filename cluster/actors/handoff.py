"""Handoff to a restarted controller actor, which finds the workers and collects their reports.

    claim a term ─▶ find the worker actors ─▶ open a control server ─▶ send each worker its address
        until it connects ─▶ ``ReportCollector`` collects reports ─▶ the actor continues with the
        collected state

Meanwhile the workers keep serving. A worker refuses the address of a controller if it already
follows a controller of a higher term.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from cluster.actors.control_server import ControlServer
from cluster.actors.controller_runner import ControllerRunner
from cluster.config.cluster import ClusterConfig
from cluster.controller.failover import CollectedState, ReportCollector
from cluster.controller.settings import ControllerSettings
from cluster.core.errors import NotReadyError, SupersededError
from cluster.sizing.start_plan import ExistingWorker, StartPlan

logger = logging.getLogger(__name__)

_POLL_S = 0.1
FIND_LIMIT_S = 10.0
"""Seconds within which a worker must reply to a restarted controller that looks for workers."""
_REDIRECT_S = 0.2
_RESTORE_LIMIT_S = 60.0
_RESTORE_PAUSE_S = 1.0
_MAX_RESTORE_PAUSE_S = 10.0


class Handoff:
    """Lets calls to a restarted controller actor wait until the earlier controller's cluster is
    restored or the first attempt has failed. Without a restart, calls do not wait.
    """

    def __init__(
        self, runner: ControllerRunner, set_up_log: Callable[[ClusterConfig], None]
    ) -> None:
        """``set_up_log`` is called with the configuration of a restored cluster."""
        self._runner = runner
        self._set_up_log = set_up_log
        self.is_pending = runner.group.was_restarted()
        """Whether the cluster of an earlier controller has yet to be restored."""
        self._has_begun = False
        self._is_settled = asyncio.Event()
        if self.is_pending:
            runner.group.call_back("restore")
        else:
            self._is_settled.set()

    async def settle(self) -> None:
        """Return once the actor can handle calls. The first call begins to restore the cluster."""
        if self.is_pending and not self._has_begun:
            self._has_begun = True
            self._runner.background.spawn(self._repeat())
        await self._is_settled.wait()

    async def _repeat(self) -> None:
        """Try to restore the cluster until an attempt succeeds. The workers keep serving."""
        runner, began_at, pause_s = self._runner, 0.0, _RESTORE_PAUSE_S
        term = 0  # claim only one term: a superseded controller must not supersede its successor
        while self.is_pending:
            try:
                async with asyncio.timeout(_RESTORE_LIMIT_S):
                    term = term or await runner.group.claim(runner.identity)
                    began_at = began_at or time.monotonic()
                    await _hand_off(runner, term, began_at)
                self.is_pending = False
                if (controller := runner.controller) is not None:
                    self._set_up_log(controller.cluster.config)
            except SupersededError as err:
                runner.retire(str(err))
                self.is_pending = False
            except Exception as err:  # any error of Ray
                logger.warning("not restored: %s", err, exc_info=not isinstance(err, NotReadyError))
                runner.failure = f"the restarted controller failed: {type(err).__name__}: {err}"
            self._is_settled.set()  # waiting calls now return; after a failure, with its error
            runner.background.notify()
            if self.is_pending:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_RESTORE_PAUSE_S)


async def _hand_off(runner: ControllerRunner, term: int, began_at: float) -> None:
    """Continue with the workers of an earlier controller; end them if they have never served.

    ``term``: term that this controller has claimed. ``began_at``: monotonic time of the first
    attempt with this term. Raises errors of Ray, ``SupersededError``, and ``NotReadyError`` while a
    worker that may have newer state does not connect, or most other hosts are silent.
    """
    group = runner.group
    try:
        found = await group.find(FIND_LIMIT_S)
        collected = await _call_workers(runner, found) if found else None
    finally:
        runner.collector = None
    if collected is None:
        never_ran = "the controller was lost before the cluster served"
        runner.failure = never_ran if found else "the restarted controller found no live worker"
        await group.end_all()
        return
    lost = {w.member.name for w in collected.memory.lost}
    unheard = collected.silent_members(group.address(), set(group.names()) - lost)
    if unheard and time.monotonic() - began_at < ControllerSettings().hold_limit_s:
        raise NotReadyError(f"most other hosts are silent: {', '.join(sorted(unheard))}")
    num_slots = max(f.num_slots for f in found)
    plan = StartPlan(config=found[0].config, placement=collected.placement, num_slots=num_slots)
    runner.resume(plan, collected, term)


async def _call_workers(
    runner: ControllerRunner, found: Sequence[ExistingWorker]
) -> CollectedState | None:
    """Make the ``found`` workers connect and report; return the collected state.

    Returns None if no worker ever was in a generation (a numbered membership of the cluster).
    """
    limits = ControllerSettings.of(found[0].config)
    server = await runner.open_server(found[0].config.cluster_token)
    collector = runner.collector = ReportCollector(
        [f.name for f in found],
        time.monotonic(),
        limit_s=limits.collect_limit_s,
        confirm_s=limits.confirm_s,
        known=runner.group.names(),
        fresh=[f.name for f in found if not f.has_connected],
    )
    calls = [asyncio.create_task(_redirect(runner, f.name, server)) for f in found]
    try:
        while not collector.is_complete(time.monotonic()):
            await runner.background.wait(lambda: collector.is_complete(time.monotonic()), _POLL_S)
    finally:
        for call in calls:
            call.cancel()
    await runner.group.check_term()
    return collector.result()


async def _redirect(runner: ControllerRunner, name: str, server: ControlServer) -> None:
    """Send a worker the server's address until it connects or reports are no longer collected."""
    while runner.collector is not None and not server.is_connected(name):
        try:
            await runner.group.redirect(name, server.address)
        except (ProcessLookupError, SupersededError):  # it has died, or follows another controller
            runner.collector.gone(name, time.monotonic())
            return
        except Exception as err:  # any error of Ray: the worker may reply later, or be lost
            logger.warning("could not send %s the address of this controller: %s", name, err)
        await asyncio.sleep(_REDIRECT_S)
