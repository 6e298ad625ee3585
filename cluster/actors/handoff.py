"""Handoff to a restarted controller actor: it finds the workers and collects their reports.

    claim a term ─▶ find the worker actors ─▶ open a control server ─▶ send each worker its address
        until it calls ─▶ ``ReportCollector`` collects the reports ─▶ the actor continues with the
        collected state

The workers serve meanwhile. They refuse the address of a controller when one with a higher term has
called.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from cluster.actors.control_server import ControlServer
from cluster.actors.runner import Runner
from cluster.controller.failover import CollectedState, ReportCollector
from cluster.controller.parts.settings import ControllerSettings
from cluster.core.errors import NotReadyError, SupersededError
from cluster.sizing.start_plan import FoundWorker, StartPlan

logger = logging.getLogger(__name__)

_POLL_S = 0.1
FIND_LIMIT_S = 10.0
"""Longest time in which a worker must answer, to be found."""
_REDIRECT_S = 0.2


async def hand_off(runner: Runner, term: int, began_at: float) -> None:
    """Continue with the workers of an earlier controller; end them if they have never served.

    ``term`` is claimed before. Raises any error of Ray, ``SupersededError``, and ``NotReadyError``
    while a worker that may know more does not call, or most other hosts are silent.
    """
    group = runner.group
    try:
        found = await group.find(FIND_LIMIT_S)
        collected = await _call_workers(runner, found) if found else None
    finally:
        runner.collector = None
    if collected is None:
        runner.failure = "the controller was lost before the cluster served"
        await group.end_all()
        return
    lost = {w.member.name for w in collected.memory.lost}
    unheard = collected.unheard(group.address(), set(group.names()) - lost)
    if unheard and time.monotonic() - began_at < ControllerSettings().hold_limit_s:
        raise NotReadyError(f"most other hosts are silent: {', '.join(sorted(unheard))}")
    num_slots = max(f.num_slots for f in found)
    plan = StartPlan(config=found[0].config, placement=collected.placement, num_slots=num_slots)
    runner.go_on(plan, collected, term)


async def _call_workers(runner: Runner, found: Sequence[FoundWorker]) -> CollectedState | None:
    """Make all found workers connect here and report."""
    limits = ControllerSettings.of(found[0].config)
    server = await runner.open_server(found[0].config.cluster_token)
    collector = runner.collector = ReportCollector(
        [f.name for f in found],
        time.monotonic(),
        limit_s=limits.collect_limit_s,
        confirm_s=limits.confirm_s,
        known=runner.group.names(),
        fresh=[f.name for f in found if not f.has_called],
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


async def _redirect(runner: Runner, name: str, server: ControlServer) -> None:
    """Send a worker the address until it calls, or none is awaited."""
    while runner.collector is not None and not server.is_connected(name):
        try:
            await runner.group.redirect(name, server.address)
        except (ProcessLookupError, SupersededError):  # it has died, or follows another one
            runner.collector.gone(name, time.monotonic())
            return
        except Exception as err:  # any error of Ray: it may answer later, or be lost
            logger.warning("%s cannot be sent the address of this controller: %s", name, err)
        await asyncio.sleep(_REDIRECT_S)
