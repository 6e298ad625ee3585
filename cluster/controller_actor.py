"""The controller as a Ray actor: wires the state machine to its sockets and to the worker actors.

``Controller`` decides, ``ControlServer`` carries frames, ``WorkerGroup`` starts and ends processes.
All three are used from the actor's event loop only. An actor that Ray has restarted takes over
what the one before it left: the workers go on meanwhile, and questions wait until it knows them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from cluster.adoption import Adopted
from cluster.background import Background
from cluster.cluster_traces import ClusterTraces, trace_cluster
from cluster.config import ClusterConfig
from cluster.control_frames import ControlFrame
from cluster.control_server import ControlServer
from cluster.controller import Controller
from cluster.controller_settings import ControllerSettings
from cluster.drain_order import DrainOrder
from cluster.errors import ConflictError, ExpertMeshError, NotReadyError, StartError
from cluster.load_profile import LoadProfile
from cluster.load_view import load_before_start, load_document, num_at_risk, placement_report
from cluster.placement import ExpertPlacement
from cluster.rebalance_job import RebalanceOrder
from cluster.reports import snapshot_before_start
from cluster.resources import ids_by_address, resolved_share
from cluster.start_plan import StartPlan, plan_start
from cluster.states import ClusterState
from cluster.takeover import Takeover
from cluster.topology import Member
from cluster.worker_group_like import FoundWorker, WorkerGroupLike

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_NODES_S = 0.5
_PLAN_LIMIT_S = 20.0
"""Longest wait for what an order to rebalance comes to; it goes on afterwards."""
_PLAN_POLL_S = 0.02
_RESERVE_LIMIT_S = 30.0
STATUS_LIMIT_S = 1.0
"""Longest wait for workers that are asked for their numbers."""
_STOP_LIMIT_S = 20.0


class ControllerActor:
    """Async actor; see ``cluster.controller_handle``. One start a life."""

    def __init__(
        self,
        group: WorkerGroupLike,
        settings: ControllerSettings | None = None,
        status_limit_s: float = STATUS_LIMIT_S,
    ) -> None:
        """``settings`` replaces the limits that follow from the configuration (in tests)."""
        self._group = group
        self._settings = settings
        self._status_limit_s = status_limit_s
        self._controller: Controller | None = None
        self._server: ControlServer | None = None
        self._address = ""
        self._plan: StartPlan | None = None
        self._profile: LoadProfile | None = None
        self._top_k = 1
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._background = Background()
        self._takeover = Takeover(self, group, self._background)
        self._asked: dict[str, str] | None = None
        self._traces: ClusterTraces | None = None
        self._starting = asyncio.Lock()

    # ---- methods of the actor -------------------------------------------------------------

    async def start(
        self,
        config: dict[str, Any],
        banks: list[dict[str, Any]],
        profile: dict[str, Any] | None = None,
        asked: dict[str, str] | None = None,
    ) -> None:
        """Begin to start all workers; all or nothing. Follow it with ``wait_snapshot``.

        ``banks`` are dicts with ``bank``, ``layer`` and ``num_experts``; ``profile`` is the load
        profile that balancedness is predicted from; ``asked`` is kept for ``origin``. A second
        call does nothing. Raises ``ConfigError`` or ``StartError``, with nothing left behind, when
        it cannot even begin.
        """
        await self.adopt()
        if self._takeover.is_under_way:
            raise StartError("controller", self._takeover.failure)
        async with self._starting:
            if self._controller is None:
                await self._begin(config, banks, profile, asked)

    async def _begin(
        self,
        config: dict[str, Any],
        banks: list[dict[str, Any]],
        profile: dict[str, Any] | None,
        asked: dict[str, str] | None,
    ) -> None:
        self._profile = LoadProfile.from_dict(profile) if profile else None
        self._top_k = max((int(b.get("top_k", 1)) for b in banks), default=1)
        plan = plan_start(
            ClusterConfig.from_dict(config),
            banks,
            self._group.resources(),
            self._group.free_cpus(),
            profile,
        )
        members = await self._reserve(plan)
        plan = plan.on(members)
        notes = {"profile": profile, "top_k": self._top_k, "asked": asked}
        self._asked = asked
        self._controller = self._make_controller(plan, members, notes=notes)
        self._background.spawn(self._bring_up(plan, members))
        self._background.spawn(self._tick_forever())
        self._background.spawn(self._watch_nodes())

    async def adopt(self) -> None:
        """Take over what an earlier controller left, if there was one.

        Returns when that is done, or has failed for the first time and is tried again. A restarted
        actor calls this itself, and every question to it begins with it.
        """
        await self._takeover.adopt()

    async def origin(self) -> dict[str, Any]:
        """What the cluster was started with: ``asked`` and the whole ``config``, with its token.

        Both are None where nothing was started. Raises ``NotReadyError`` while the workers of an
        earlier controller cannot be reached.
        """
        await self.adopt()
        if self._takeover.is_under_way:
            raise NotReadyError(self._takeover.failure)
        async with self._starting:
            config = self._plan.config.to_dict() if self._controller and self._plan else None
        return {"asked": self._asked if config else None, "config": config}

    async def snapshot(self, fresh: bool = False) -> dict[str, Any]:
        """The cluster's state; ``fresh`` asks every worker for its numbers of this moment first."""
        await self.adopt()
        if fresh and self._controller is not None:
            await self._ask_workers(self._controller)
        return self._snapshot()

    async def wait_snapshot(self, known_version: int, timeout_s: float) -> dict[str, Any]:
        """The state as soon as it is not ``known_version`` any more, at the latest in time."""
        await self.adopt()
        await self._background.wait(lambda: self._version() != known_version, timeout_s)
        return self._snapshot()

    async def placement(self) -> dict[str, Any]:
        """Maps, load of this moment and balancedness of all banks (``placement --json``)."""
        await self.adopt()
        if self._controller is None:
            return {"schema": 1, "epoch": 0, "banks": []}
        await self._ask_workers(self._controller)
        controller = self._controller
        return placement_report(controller.placement, controller.load, self._profile)

    async def load(self) -> dict[str, Any]:
        """Tokens by expert and by copy, and what balance they made (``load --json``)."""
        await self.adopt()
        if self._controller is None:
            return load_before_start()
        await self._ask_workers(self._controller)
        controller = self._controller
        model = str(controller.workers.model.get("name"))
        document = load_document(
            controller.placement, controller.load, self._profile, model, self._top_k
        )
        domains = controller.workers.domains()
        for bank, entry in zip(controller.placement.banks, document["banks"], strict=True):
            entry["at_risk"] = num_at_risk(bank, domains)
        return {**document, "workers": controller.workers.holders()}

    async def drain(self, order: dict[str, Any]) -> dict[str, Any]:
        """Begin to drain (fields of ``DrainOrder``); the operation.

        Raises ``ConflictError``, ``UnknownNameError``, ``RequestError``; nothing was changed then.
        """
        wanted = DrainOrder.from_dict(order)
        operation = (await self._serving_controller()).draining.begin(wanted, time.monotonic())
        self._background.notify()
        return operation.to_dict()

    async def rebalance(self, order: dict[str, Any]) -> dict[str, Any]:
        """Move experts to where the load is (fields of ``RebalanceOrder``); the operation.

        It returns when it is decided what is to be done. Raises ``ConflictError`` and
        ``RequestError``; nothing was changed then.
        """
        wanted = RebalanceOrder.from_dict(order)
        controller = await self._serving_controller()
        operation = controller.rebalancing.begin(wanted, time.monotonic())
        deadline = time.monotonic() + _PLAN_LIMIT_S
        while controller.rebalancing.is_deciding(operation) and time.monotonic() < deadline:
            await asyncio.sleep(_PLAN_POLL_S)  # the ticks go on
        self._background.notify()
        return operation.to_dict()

    async def operation(self, operation_id: str) -> dict[str, Any]:
        """One operation. Raises ``UnknownNameError``."""
        return (await self._serving_controller()).operations.find(operation_id).to_dict()

    async def operations(self) -> list[dict[str, Any]]:
        """The operations that are remembered, newest last."""
        await self.adopt()
        return self._controller.operations.to_list() if self._controller else []

    async def cancel_operation(self, operation_id: str) -> dict[str, Any]:
        """Give an operation up. Raises ``UnknownNameError`` and ``ConflictError``."""
        controller = await self._serving_controller()
        operation = controller.operations.find(operation_id)
        owner = controller.draining if operation.kind == "drain" else controller.rebalancing
        owner.cancel(operation, time.monotonic())
        self._background.notify()
        return operation.to_dict()

    async def control_address(self) -> str:
        """``host:port`` of the control server; empty before the start."""
        return self._address

    async def stop(self) -> None:
        """End all workers and return when they are gone. The caller ends this actor."""
        await self.adopt()
        if self._controller is not None and self._server is not None:
            controller = self._controller
            controller.stop(time.monotonic())
            self._background.notify()
            await self._background.wait(
                lambda: controller.state is ClusterState.STOPPED, _STOP_LIMIT_S
            )
            await self._server.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.stop)
        self._background.cancel()
        self._planner.shutdown(wait=False, cancel_futures=True)

    # ---- what the controller acts through -------------------------------------------------

    def send(self, worker: str, frame: ControlFrame) -> None:
        """Send to one worker."""
        if self._server is not None:
            self._server.send(worker, frame)

    def start_worker(self, member: Member, placement: ExpertPlacement) -> None:
        """Start one more worker in the background."""
        self._background.spawn(self._add_worker(member, placement))

    def end_workers(self, workers: Sequence[str]) -> None:
        """End workers in the background."""
        if self._server is not None:
            for worker in workers:
                self._server.drop(worker)
        self._background.spawn(self._end_workers(list(workers)))

    def end_all(self) -> None:
        """End all workers in the background and say when they are gone."""
        self._background.spawn(self._end_all())

    # ---- what happens on the sockets ------------------------------------------------------

    def on_frame(self, worker: str, frame: ControlFrame) -> None:
        """A worker sent a frame."""
        if self._takeover.listens:
            self._takeover.frame(worker, frame)
            self._background.notify()
        elif self._controller is not None:
            self._controller.frame(worker, frame, time.monotonic())
            self._background.notify()

    def on_closed(self, worker: str, reason: str) -> None:
        """A worker's connection closed."""
        if self._takeover.listens:
            self._takeover.gone(worker)
            self._background.notify()
        elif self._controller is not None:
            self._controller.disconnected(worker, reason, time.monotonic())
            self._background.notify()

    # ---- what a takeover asks for ---------------------------------------------------------

    def limits(self, config: ClusterConfig) -> ControllerSettings:
        """See ``TakeoverHost``."""
        return self._settings or ControllerSettings(
            detection_limit_s=config.transport.detection_limit_s,
            generation_limit_s=config.transport.connect_timeout_s + 5.0,
        )

    async def open_server(self, token: str) -> str:
        """See ``TakeoverHost``."""
        if self._server is not None:
            await self._server.close()
        self._server = ControlServer(token, self)
        self._address = await self._server.start(self._group.address())
        return self._address

    def is_connected(self, worker: str) -> bool:
        """See ``TakeoverHost``."""
        return self._server is not None and self._server.is_connected(worker)

    def take_over(self, found: Sequence[FoundWorker], adopted: Adopted) -> None:
        """See ``TakeoverHost``."""
        notes = adopted.memory.get("notes", {})
        profile = notes.get("profile")
        self._profile = LoadProfile.from_dict(profile) if profile else None
        self._top_k = int(notes.get("top_k", 1))
        self._asked = notes.get("asked")
        plan = StartPlan(
            config=found[0].config,
            placement=adopted.placement,
            share=resolved_share(found[0].config.workers),
            num_slots=max(f.num_slots for f in found),
        )
        members, term = adopted.members, adopted.term
        controller = self._make_controller(plan, members, notes=notes, term=term)
        controller.adopt(adopted, time.monotonic())
        self._controller = controller
        self._background.spawn(self._group.end_others([r.name for r in controller.workers.alive()]))
        logger.info("term %d: %d workers adopted", adopted.term, len(adopted.greetings))
        self._background.spawn(self._tick_forever())
        self._background.spawn(self._watch_nodes())

    # ---- tasks ----------------------------------------------------------------------------

    async def _reserve(self, plan: StartPlan) -> tuple[Member, ...]:
        """Open the control server and reserve room; on an error nothing is left behind."""
        try:
            await self.open_server(plan.config.cluster_token)
            return await self._group.reserve(
                plan.config.workers.pools, plan.share, _RESERVE_LIMIT_S
            )
        except (ExpertMeshError, OSError):
            assert self._server is not None, "it is there before it is opened"
            await self._server.close()
            await self._group.end_all()
            raise

    async def _bring_up(self, plan: StartPlan, members: Sequence[Member]) -> None:
        """Create the actors, and watch them until they have called."""
        assert self._server is not None
        assert self._controller is not None
        extras = {m.name: plan.extra(m) for m in members}
        try:
            await self._group.start(members, plan.config.to_dict(), self._address, extras)
            await self._group.watch(self._server.is_connected, self._died)
        except StartError as err:
            self._died(err.part, err.reason)
        except Exception as err:  # whatever Ray raises: the start must not hang
            logger.exception("the workers could not be created")
            self._controller.fail_start(f"{type(err).__name__}: {err}", time.monotonic())
            self._background.notify()

    async def _add_worker(self, member: Member, placement: ExpertPlacement) -> None:
        """Create an actor, and watch it until it has called."""
        assert self._server is not None
        assert self._plan is not None
        extra = replace(self._plan, placement=placement).extra(member)
        try:
            await self._group.add(member, self._plan.config.to_dict(), self._address, extra)
            await self._group.watch(self._server.is_connected, self._died)
        except StartError as err:
            self._died(err.part, err.reason)
        except Exception as err:  # whatever Ray raises: the place must not stay empty unseen
            logger.exception("%s could not be created", member.name)
            self._died(member.name, f"{type(err).__name__}: {err}")

    async def _end_workers(self, workers: list[str]) -> None:
        assert self._controller is not None
        try:
            await self._group.end(workers)
        finally:
            self._controller.draining.ended(workers, time.monotonic())
            self._background.notify()

    async def _end_all(self) -> None:
        assert self._controller is not None
        try:
            await self._group.end_all()
        finally:
            self._controller.all_ended(time.monotonic())
            self._background.notify()

    async def _tick_forever(self) -> None:
        assert self._controller is not None
        while self._controller.state is not ClusterState.STOPPED:
            await asyncio.sleep(_TICK_S)
            version = self._controller.version
            try:
                self._controller.tick(time.monotonic())
            except Exception:  # detection must go on
                logger.exception("a tick of the controller failed")
            if self._controller.version != version:
                self._background.notify()

    async def _watch_nodes(self) -> None:
        """Drain the workers of nodes that are to go; fill their places when the nodes have gone."""
        assert self._controller is not None
        asked: set[str] = set()
        while self._controller.state is not ClusterState.STOPPED:
            await asyncio.sleep(_NODES_S)
            try:
                leaving = await asyncio.to_thread(self._group.leaving)
                nodes = await asyncio.to_thread(self._group.resources)
            except Exception as err:  # whatever Ray raises: it is asked again
                logger.debug("no news of the nodes: %s", err)
                continue
            for name in sorted(set(leaving) - asked):
                self._controller.draining.wish(name, time.monotonic())
            asked |= set(leaving)
            self._controller.draining.nodes_alive(ids_by_address(nodes))

    def _died(self, name: str, reason: str) -> None:
        if self._controller is not None and name in self._controller.workers:
            self._controller.lost({name: reason}, time.monotonic())
            self._background.notify()

    async def _ask_workers(self, controller: Controller) -> None:
        controller.request_status()
        await self._background.wait(
            lambda: controller.workers.status_complete, self._status_limit_s
        )

    async def _serving_controller(self) -> Controller:
        """Raises ``ConflictError`` before the start."""
        await self.adopt()
        if self._controller is None:
            raise ConflictError(self._takeover.failure or "the cluster has not been started")
        return self._controller

    # ---- small things ---------------------------------------------------------------------

    def _make_controller(
        self,
        plan: StartPlan,
        members: Sequence[Member],
        *,
        notes: Mapping[str, Any],
        term: int = 1,
    ) -> Controller:
        self._plan = plan
        config = plan.config
        can_grow = plan.share.device == "cpu"
        now = time.monotonic()
        controller = Controller(
            self.limits(config),
            members=members,
            placement=plan.placement,
            model={"name": config.model.served_model_name, "path": config.model.path},
            link=self,
            now=now,
            num_slots=plan.num_slots,
            room=None if can_grow else plan.num_slots,
            load=config.load,
            config=config,
            top_k=self._top_k,
            mode=config.workers.mode,
            mode_reason=config.workers.mode_reason,
            term=term,
            identity=secrets.token_hex(8),
            notes=notes,
            wall_time_offset_s=time.time() - now,
            executor=self._planner,
        )
        self._traces = trace_cluster(controller, config.observability)
        return controller

    def _snapshot(self) -> dict[str, Any]:
        mine: dict[str, Any] = {"controller_pid": os.getpid()}
        if self._controller is not None:
            return self._controller.snapshot() | mine
        if self._takeover.failure:
            is_under_way = self._takeover.is_under_way
            state = ClusterState.RECOVERING if is_under_way else ClusterState.STOPPED
            mine |= {"state": state.value, "error": self._takeover.failure}
        return snapshot_before_start() | mine

    def _version(self) -> int:
        return self._controller.version if self._controller else 0
