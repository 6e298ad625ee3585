"""Runs a controller: passes events to it and carries out its effects.

``Controller`` decides, ``ControlServer`` transports frames, ``WorkerGroup`` starts and ends
processes. All three run on the event loop of the controller actor.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.actors.control_server import ControlServer
from cluster.actors.gateways import Gateways
from cluster.actors.processor_waits import ProcessorWaits
from cluster.actors.tasks import Background
from cluster.config.resources import NodeResources, ids_by_address, resolved_share
from cluster.controller.cluster import Cluster
from cluster.controller.controller import Controller
from cluster.controller.effects import (
    Effect,
    EndAllWorkers,
    EndWorkers,
    RecordTrace,
    ReleasePlaces,
    SendFrame,
    StartWorker,
)
from cluster.controller.failover import CollectedState, ReportCollector
from cluster.controller.failure_detector import TICK_S
from cluster.controller.settings import ControllerSettings
from cluster.core.errors import (
    DuplicateRegistrationError,
    StartError,
    SupersededError,
)
from cluster.core.frames import Alive, ControlFrame, Superseded
from cluster.core.states import ClusterState
from cluster.core.topology import Member
from cluster.policy.node_following import followed_nodes
from cluster.sizing.start_plan import StartPlan
from cluster.tracing import logs
from cluster.tracing.disks import DiskMonitor
from cluster.tracing.exporter import TraceExport, start_traces

if TYPE_CHECKING:
    from cluster.actors.worker_group import WorkerGroup  # imports Ray

logger = logging.getLogger(__name__)

T = TypeVar("T")
_NODES_S = 0.5
_RESERVE_LIMIT_S = 30.0
_END_AGAIN_S = 1.0


class ControllerRunner:
    """Connects one controller to its sockets and workers. Used on the actor's event loop only."""

    def __init__(self, group: WorkerGroup, background: Background) -> None:
        self.group = group
        self.background = background
        self.identity = secrets.token_hex(8)
        """Random id of this controller process; distinguishes controllers of the same term."""
        self.controller: Controller | None = None
        """The controller; None before the start, and after another controller has taken over."""
        self.failure = ""
        """Reason why there is no controller; empty before the start and while a controller runs."""
        self.collector: ReportCollector | None = None
        """Receiver of workers' frames while a restarted actor collects reports; else None."""
        self.server: ControlServer | None = None
        self.plan: StartPlan | None = None
        """Start plan with the configuration; None before the start."""
        self.gateways = Gateways(lambda: self.controller, background.notify)
        self.traces: TraceExport | None = None
        self._disks = DiskMonitor(lambda: [logs.OUTPUT.folder])
        self._waits = ProcessorWaits()
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner")

    # ---- begin and end --------------------------------------------------------------------

    async def open_server(self, token: str) -> ControlServer:
        """Close an earlier control server, and open one for workers that know ``token``."""
        if self.server is not None:
            await self.server.close()
        self.server = ControlServer(token, self)
        await self.server.start(self.group.address())
        return self.server

    async def start(self, plan: StartPlan, notes: Mapping[str, Any]) -> None:
        """Begin to start a cluster.

        After an error, release all resources and raise the error again.
        """
        try:
            await self.open_server(plan.config.cluster_token)
            workers = plan.config.workers
            members = await asyncio.to_thread(self.group.reserve, workers, _RESERVE_LIMIT_S)
            term = await self.group.claim(self.identity)
            plan = plan.with_members(members)
        except Exception:  # also any error of Ray
            assert self.server is not None, "open_server sets it before it can fail"
            await self.server.close()
            await self.group.end_all()
            raise
        self._run(self._make(plan, members, notes, term), plan)
        self.background.spawn(self._bring_up(members, plan))

    def resume(self, plan: StartPlan, collected: CollectedState, term: int) -> None:
        """Continue the cluster of an earlier controller with the state that its workers reported.

        ``term``: term of this controller. Workers that are not alive in the reported state are
        ended.
        """
        controller = self._make(plan, collected.members, collected.memory.notes, term)
        controller.restore(collected, time.monotonic())
        alive = {r.name for r in controller.cluster.workers.alive()}
        self._run(controller, plan)
        self._carry_out(EndWorkers(tuple(name for name in self.group.names() if name not in alive)))
        if gone := self.group.added_places() - set(controller.cluster.places.names()):
            self._carry_out(ReleasePlaces(tuple(sorted(gone))))
        logger.info("term %d: %d workers found", term, len(collected.frames_by_worker))

    async def stop(self) -> None:
        """Close the control server and cancel background tasks, once the workers have ended."""
        if self.server is not None:
            await self.server.close()
        if self.traces is not None:
            await asyncio.to_thread(self.traces.stop)
        self.background.cancel()
        self._planner.shutdown(wait=False, cancel_futures=True)

    def _make(
        self, plan: StartPlan, members: Sequence[Member], notes: Mapping[str, Any], term: int
    ) -> Controller:
        assert self.server is not None
        now = time.monotonic()
        cluster = Cluster(
            members,
            plan.placement,
            plan.config,
            now=now,
            num_slots=plan.num_slots,
            term=term,
            identity=self.identity,
            host=self.server.address.rpartition(":")[0],
            wall_time_offset_s=time.time() - now,
            notes=notes,
        )
        return Controller(cluster, ControllerSettings.of(plan.config), self._planner)

    def _run(self, controller: Controller, plan: StartPlan) -> None:
        """Make ``controller`` the active controller, and start its periodic tasks."""
        self.controller, self.plan, self.failure = controller, plan, ""
        self.traces = start_traces(plan.config.observability.otlp_endpoint, "controller")
        self.background.spawn(self._tick_forever(controller))
        self.background.spawn(self._watch_nodes(controller))
        self._carry_out_all()

    def retire(self, reason: str) -> None:
        """End the actor's process. Ray restarts the actor unless another process replaced it."""
        logger.warning("this controller ends: %s", reason)
        self.controller, self.failure = None, reason
        self.background.notify()
        self.group.end_this_process()

    # ---- events in, effects out -------------------------------------------------------------

    def handle_event(self, event: Callable[[float], T]) -> T:
        """Call a controller method with the current time, then carry out the resulting effects."""
        try:
            return event(time.monotonic())
        finally:
            self._carry_out_all()

    def _carry_out_all(self) -> None:
        while self.controller is not None and (effects := self.controller.cluster.take_effects()):
            for effect in effects:
                try:
                    self._carry_out(effect)
                except Exception:  # later effects must still be carried out
                    logger.exception("%s failed", type(effect).__name__)
        self.background.notify()

    def _carry_out(self, effect: Effect) -> None:
        assert self.server is not None
        assert self.plan is not None
        assert self.controller is not None
        match effect:
            case SendFrame(frame, workers):
                self.server.send(frame, *workers)
            case StartWorker(member, placement, holders):
                plan = replace(self.plan, placement=placement, holders=holders)
                self.background.spawn(self._bring_up([member], plan))
            case EndWorkers(workers):
                for worker in workers:
                    self.server.drop(worker)
                end, ended = self.group.end, self.controller.draining.ended
                self.background.spawn(
                    self._retry_until_done(partial(end, workers), partial(ended, workers))
                )
            case ReleasePlaces(places):
                self.background.spawn(self._retry_until_done(partial(self.group.release, places)))
            case EndAllWorkers():
                self.background.spawn(
                    self._retry_until_done(self.group.end_all, self.controller.all_ended)
                )
            case RecordTrace(name, seconds, attributes, error, span_id):
                if self.traces is not None:
                    self.traces.record(name, seconds, attributes, error, span_id)

    # ---- events of the sockets (``ControlEvents``) -------------------------------------------

    def on_frame(self, worker: str, frame: ControlFrame) -> None:
        target = self.collector or self.controller
        if isinstance(frame, Superseded) and target is not None:
            self.retire(f"{worker} follows another controller, of term {frame.term}")
        elif target is not None and isinstance(frame, Alive):
            target.frame(worker, frame, time.monotonic())  # frequent, and no waiting call needs it
        elif target is not None:
            try:
                self.handle_event(partial(target.frame, worker, frame))
            except DuplicateRegistrationError as err:
                self.retire(str(err))

    def on_closed(self, worker: str, reason: str, is_invalid: bool) -> None:
        if self.collector is not None:
            self.collector.gone(worker, time.monotonic())
        elif self.controller is not None:
            self.handle_event(partial(self.controller.disconnected, worker, reason, is_invalid))
        self.background.notify()

    # ---- tasks ----------------------------------------------------------------------------

    async def _bring_up(self, members: Sequence[Member], plan: StartPlan) -> None:
        """Create worker actors, and watch them until all have connected."""
        server, names = self.server, [m.name for m in members]
        assert server is not None
        try:
            watching = asyncio.create_task(self.group.watch_creation(names, self._created))
            try:
                await self.group.start(members, plan, server.address)
            finally:
                watching.cancel()
            for name in names:
                self._created(name)
            await self.group.watch(server.is_connected, self._died)
        except SupersededError as err:
            self.retire(str(err))
        except StartError as err:
            self._died(err.part, err.reason)
        except Exception as err:  # report any error of Ray, so that the start cannot hang
            logger.exception("could not create workers")
            error = f"{type(err).__name__}: {err}"
            if self.controller is not None:
                self.handle_event(partial(self.controller.fail_start, error))
            for name in names:
                self._died(name, error)

    def _created(self, name: str) -> None:
        if self.controller is not None:
            self.handle_event(partial(self.controller.created, name))

    def _died(self, name: str, reason: str) -> None:
        if self.controller is not None and name in self.controller.cluster.workers:
            self.handle_event(partial(self.controller.lost, {name: reason}))

    async def _retry_until_done(
        self,
        order: Callable[[], Awaitable[None]],
        event: Callable[[float], None] = lambda now: None,
    ) -> None:
        """Repeat Ray call ``order`` until it succeeds, then pass ``event`` to the controller."""
        while self.controller is not None:
            try:
                await order()
            except SupersededError as err:
                self.retire(str(err))
            except Exception:  # any error of Ray
                logger.exception("could not end or release workers, trying again")
                await asyncio.sleep(_END_AGAIN_S)
            else:
                if self.controller is not None:
                    self.handle_event(event)
                break

    async def _tick_forever(self, controller: Controller) -> None:
        while self._is_active(controller):
            await asyncio.sleep(TICK_S)
            try:
                self._watch_starvation(controller)
                self.handle_event(controller.tick)
                controller.cluster.update_low_disks(self._disks.low(time.monotonic()))
                self.background.notify()
            except Exception:  # detection must continue
                logger.exception("a tick of the controller failed")
            self.gateways.drop_silent()

    def _watch_starvation(self, controller: Controller) -> None:
        """Report how long workers of this host with late signs of life waited for a processor."""
        suspects = controller.detection.suspects(time.monotonic())
        waits = self._waits.take(suspects.values())
        found = {name: waits[pid] for name, pid in suspects.items() if waits[pid]}
        if found:
            self.handle_event(partial(controller.detection.starved, found))

    async def _watch_nodes(self, controller: Controller) -> None:
        """Repeatedly drain workers on nodes that Ray drains, and report the live nodes."""
        while self._is_active(controller):
            await asyncio.sleep(_NODES_S)
            try:
                leaving, nodes = await asyncio.to_thread(
                    lambda: (self.group.draining_nodes(), self.group.resources())
                )
            except Exception as err:  # any error of Ray: retried in the next round
                logger.debug("could not list the nodes: %s", err)
                continue
            try:
                self._saw_nodes(controller, leaving, nodes)
            except Exception:  # retried in the next round
                logger.exception("could not follow the nodes")

    def _saw_nodes(
        self, controller: Controller, leaving: Collection[str], nodes: Sequence[NodeResources]
    ) -> None:
        homes, workers = self.group.node_ids_by_worker(), controller.cluster.config.workers
        for name in sorted(n for n, home in homes.items() if home in leaving):
            self.handle_event(partial(controller.draining.requested, name, node_leaves=True))
        self.handle_event(partial(controller.cluster.nodes_alive, ids_by_address(nodes)))
        share = resolved_share(workers)
        followed = followed_nodes(nodes, share, workers.pools, homes, leaving)
        self.handle_event(partial(controller.following.observe, followed))

    def _is_active(self, controller: Controller) -> bool:
        is_over = controller.cluster.state is ClusterState.STOPPED
        return self.controller is controller and not is_over
