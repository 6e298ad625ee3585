"""The controller as a Ray actor: connects the state machine with its sockets and the worker actors.

``Controller`` decides, ``ControlServer`` carries frames, ``WorkerGroup`` starts and ends processes:
``_tell`` hands the controller an event, and then carries out its effects.
All three run on the actor's event loop. An actor that Ray has restarted continues with the workers
of the one before: they serve meanwhile, and calls wait until their state is collected.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from cluster.actors.control_server import ControlServer
from cluster.actors.handoff import Handoff
from cluster.actors.start_plan import StartPlan, plan_start
from cluster.actors.tasks import Background
from cluster.actors.traces import ClusterTraces, cluster_traces
from cluster.actors.worker_group_like import FoundWorker, WorkerGroupLike
from cluster.config.cluster import ClusterConfig
from cluster.config.resources import ids_by_address, resolved_share
from cluster.controller.controller import Controller
from cluster.controller.failover.collect import CollectedState
from cluster.controller.parts.cluster import Cluster
from cluster.controller.parts.drains import DrainOrder
from cluster.controller.parts.effects import Effect, End, EndAll, Send, Start, Trace
from cluster.controller.parts.gateway_polls import GatewayPolls
from cluster.controller.parts.settings import ControllerSettings
from cluster.controller.parts.workers import MODEL_FACTS
from cluster.controller.rebalance.job import RebalanceOrder
from cluster.core.codec import from_plain
from cluster.core.errors import (
    ConflictError,
    ExpertMeshError,
    NotReadyError,
    RequestError,
    StartError,
    SupersededError,
)
from cluster.core.frames import ControlFrame, Superseded
from cluster.core.load_profile import LoadProfile
from cluster.core.states import ClusterState
from cluster.core.topology import Member
from cluster.load.view import load_before_start, load_document, num_at_risk, placement_report

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TICK_S = 0.1
_NODES_S = 0.5
_PLAN_LIMIT_S = 20.0
"""Longest wait for the decision on an order to rebalance; it continues afterwards."""
_PLAN_POLL_S = 0.02
_RESERVE_LIMIT_S = 30.0
STATUS_LIMIT_S = 1.0
"""Longest wait for the numbers of the workers."""
_STOP_LIMIT_S = 20.0
_END_AGAIN_S = 1.0


class ControllerActor:
    """Async actor; see ``cluster.actors.controller_client``. It starts one cluster in its life."""

    def __init__(self, group: WorkerGroupLike, status_limit_s: float = STATUS_LIMIT_S) -> None:
        self._group = group
        self.identity = secrets.token_hex(8)
        self._status_limit_s = status_limit_s
        self._controller: Controller | None = None
        self._server: ControlServer | None = None
        self._address = ""
        self._plan: StartPlan | None = None
        self._profile: LoadProfile | None = None
        self._top_k = 1
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._background = Background()
        self._polls = GatewayPolls()
        self._handoff = Handoff(self, group, self._background)
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
        profile for predictions; ``asked`` is kept for ``origin``. A second call does nothing.
        Raises ``ConfigError`` or ``StartError``, after everything is released, if it cannot even
        begin.
        """
        await self.restore()
        if self._handoff.is_under_way:
            raise StartError("controller", self._handoff.failure)
        async with self._starting:
            if self._controller is None:
                nodes = await asyncio.to_thread(self._group.resources)
                free_cpus = await asyncio.to_thread(self._group.free_cpus)
                known = ClusterConfig.from_dict(config)
                plan = plan_start(known, banks, nodes, free_cpus, profile)
                assert plan.load is not None, "the workers do not run yet"
                notes = {"profile": profile, "top_k": plan.load.top_k, "asked": asked}
                members, term = await self._reserve(plan)
                plan = plan.on(members)
                controller = self._make_controller(plan, members, notes=notes, term=term)
                self._background.spawn(self._bring_up(members, plan, self._start_failed))
                self._run(controller)

    async def restore(self) -> None:
        """Continue the cluster of an earlier controller, if there was one.

        Returns when that is done, or after a first failure, while retries continue. A restarted
        actor calls this itself, and every call to it waits for it first.
        """
        await self._handoff.restore()

    async def origin(self) -> dict[str, Any]:
        """What the cluster was started with: ``asked`` and the whole ``config``, with its token.

        Both are None if nothing was started. Raises ``NotReadyError`` while the workers of an
        earlier controller cannot be reached.
        """
        await self.restore()
        if self._handoff.is_under_way:
            raise NotReadyError(self._handoff.failure)
        async with self._starting:
            config = self._plan.config.to_dict() if self._controller and self._plan else None
        return {"asked": self._asked if config else None, "config": config}

    async def snapshot(self, fresh: bool = False) -> dict[str, Any]:
        """The cluster's state; ``fresh`` requests the current numbers of every worker first."""
        await (self._fresh_cluster() if fresh else self.restore())
        return self._snapshot()

    async def wait_snapshot(
        self, known_version: int, timeout_s: float, gateway: str = ""
    ) -> dict[str, Any]:
        """The state once its version differs from ``known_version``, or after the time limit.

        ``gateway`` is the caller's name if it is one, which asks again at once.
        """
        await self.restore()
        if gateway and self._polls.begin(gateway):
            self._note(f"{gateway} is back", "it serves again")
        try:
            await self._background.wait(lambda: self._version() != known_version, timeout_s)
        finally:
            self._polls.end(gateway, time.monotonic())
        return self._snapshot()

    async def gateway_leaves(self, gateway: str) -> None:
        """A gateway ends in order."""
        if self._polls.leave(gateway):
            self._note(f"{gateway} has left", "its requests have ended")

    async def streams_paused(self, generation: int, pause_s: float) -> None:
        """A gateway's streams stood still for this time when the generation formed."""
        if self._controller is not None:
            cluster = self._controller.cluster
            cluster.history.paused(generation, pause_s)
            cluster.touch()
            self._background.notify()

    def _note(self, cause: str, effect: str) -> None:
        if self._controller is not None:
            self._tell(partial(self._controller.cluster.note, cause, effect))

    async def placement(self) -> dict[str, Any]:
        """Maps, current load and balancedness of all banks (``placement --json``)."""
        cluster = await self._fresh_cluster()
        if cluster is None:
            return {"schema": 1, "epoch": 0, "banks": []}
        return placement_report(cluster.placement, cluster.load, self._profile)

    async def load(self) -> dict[str, Any]:
        """Tokens by expert and by copy, and the resulting balance (``load --json``)."""
        cluster = await self._fresh_cluster()
        if cluster is None:
            return load_before_start()
        model = str(cluster.workers.model.get("name"))
        document = load_document(cluster.placement, cluster.load, self._profile, model, self._top_k)
        domains = cluster.workers.domains()
        for bank, entry in zip(cluster.placement.banks, document["banks"], strict=True):
            entry["at_risk"] = num_at_risk(bank, domains)
        return {**document, "workers": cluster.workers.holders()}

    async def drain(self, order: dict[str, Any]) -> dict[str, Any]:
        """Begin to drain (fields of ``DrainOrder``); the operation.

        Raises ``ConflictError``, ``UnknownNameError``, ``RequestError``; nothing has changed then.
        """
        wanted = from_plain(order, DrainOrder, RequestError)
        controller = await self._serving_controller()
        return self._tell(partial(controller.draining.begin, wanted)).to_dict()

    async def rebalance(self, order: dict[str, Any]) -> dict[str, Any]:
        """Move experts to where the load is (fields of ``RebalanceOrder``); the operation.

        Returns once the decision is made. Raises ``ConflictError`` and ``RequestError``; nothing
        has changed then.
        """
        wanted = from_plain(order, RebalanceOrder, RequestError)
        controller = await self._serving_controller()
        operation = self._tell(partial(controller.rebalancing.begin, wanted))
        deadline = time.monotonic() + _PLAN_LIMIT_S
        while controller.rebalancing.is_deciding(operation) and time.monotonic() < deadline:
            await asyncio.sleep(_PLAN_POLL_S)  # the ticks continue
        return operation.to_dict()

    async def operation(self, operation_id: str) -> dict[str, Any]:
        """One operation. Raises ``UnknownNameError``."""
        controller = await self._serving_controller()
        return controller.cluster.operations.find(operation_id).to_dict()

    async def operations(self) -> list[dict[str, Any]]:
        """The recorded operations, newest last."""
        await self.restore()
        return self._controller.cluster.operations.to_list() if self._controller else []

    async def cancel_operation(self, operation_id: str) -> dict[str, Any]:
        """Cancel an operation. Raises ``UnknownNameError`` and ``ConflictError``."""
        controller = await self._serving_controller()
        operation = controller.cluster.operations.find(operation_id)
        owner = controller.draining if operation.kind == "drain" else controller.rebalancing
        self._tell(partial(owner.cancel, operation))
        return operation.to_dict()

    async def stop(self) -> None:
        """End all workers and return when they have ended. The caller ends this actor."""
        await self.restore()
        if self._controller is not None and self._server is not None:
            controller = self._controller
            self._tell(controller.stop)
            await self._background.wait(
                lambda: controller.cluster.state is ClusterState.STOPPED, _STOP_LIMIT_S
            )
            await self._server.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.stop)
        self._background.cancel()
        self._planner.shutdown(wait=False, cancel_futures=True)

    # ---- events in, effects out -------------------------------------------------------------

    def _tell(self, event: Callable[[float], T]) -> T:
        """The controller takes an event (a method of it, but for the time), with all effects."""
        try:
            return event(time.monotonic())
        finally:
            while self._controller is not None and (
                effects := self._controller.cluster.take_effects()
            ):
                for effect in effects:
                    self._carry_out(effect)
            self._background.notify()

    def _carry_out(self, effect: Effect) -> None:
        assert self._server is not None
        match effect:
            case Send(frame, workers):
                self._server.send(frame, *workers)
            case Start(member, placement):
                assert self._plan is not None
                plan = replace(self._plan, placement=placement)
                failed = partial(self._died, member.name)
                self._background.spawn(self._bring_up([member], plan, failed))
            case End(workers):
                for worker in workers:
                    self._server.drop(worker)
                end = partial(self._group.end, workers)
                self._background.spawn(self._end(end, lambda c: partial(c.ended, workers)))
            case Trace():
                if self._traces is not None:
                    self._traces.record(effect)
            case EndAll():
                self._background.spawn(self._end(self._group.end_all, lambda c: c.all_ended))

    # ---- events of the sockets (``ControlEvents``) -------------------------------------------

    def on_frame(self, worker: str, frame: ControlFrame) -> None:
        target = self._handoff.collector or self._controller
        if isinstance(frame, Superseded) and self._controller is not None:
            self._retire(f"{worker} follows another controller")
        elif target is not None:
            self._tell(partial(target.frame, worker, frame))

    def on_closed(self, worker: str, reason: str) -> None:
        if self._handoff.collector is not None:
            self._handoff.collector.gone(worker)
        elif self._controller is not None:
            self._tell(partial(self._controller.disconnected, worker, reason))
        self._background.notify()

    # ---- calls of the handoff -------------------------------------------------------------

    async def open_server(self, token: str) -> str:
        if self._server is not None:
            await self._server.close()
        self._server = ControlServer(token, self)
        self._address = await self._server.start(self._group.address())
        return self._address

    def is_connected(self, worker: str) -> bool:
        return self._server is not None and self._server.is_connected(worker)

    def continue_with(self, found: Sequence[FoundWorker], collected: CollectedState) -> None:
        plan = StartPlan(
            config=found[0].config,
            placement=collected.placement,
            share=resolved_share(found[0].config.workers),
            num_slots=max(f.num_slots for f in found),
        )
        notes = collected.memory.notes
        controller = self._make_controller(
            plan, collected.members, notes=notes, term=collected.term
        )
        self._run(controller)
        self._tell(partial(controller.restore, collected))
        self._background.spawn(
            self._group.end_others([r.name for r in controller.cluster.workers.alive()])
        )
        logger.info("term %d: %d workers found", collected.term, len(collected.greetings))

    # ---- tasks ----------------------------------------------------------------------------

    async def _reserve(self, plan: StartPlan) -> tuple[tuple[Member, ...], int]:
        """Open the control server, reserve room, claim a term; release all after an error."""
        try:
            await self.open_server(plan.config.cluster_token)
            pools = plan.config.workers.pools
            members = await self._group.reserve(pools, plan.share, _RESERVE_LIMIT_S)
            return members, await self._group.claim(1, self.identity)
        except (ExpertMeshError, OSError):
            assert self._server is not None, "it is there before it is opened"
            await self._server.close()
            await self._group.end_all()
            raise

    def _run(self, controller: Controller) -> None:
        """Direct calls and frames to this controller, and let time pass for it."""
        self._controller = controller
        self._background.spawn(self._tick_forever(controller))
        self._background.spawn(self._watch_nodes(controller))

    async def _bring_up(
        self, members: Sequence[Member], plan: StartPlan, failed: Callable[[str], None]
    ) -> None:
        """Create actors, and watch them until they have called.

        ``failed`` gets an error that is not a worker's own.
        """
        assert self._server is not None
        try:
            extras = {m.name: plan.extra(m) for m in members}
            await self._group.start(members, plan.config.to_dict(), self._address, extras)
            if self._controller is not None:
                for member in members:
                    self._tell(partial(self._controller.created, member.name))
            await self._group.watch(self._server.is_connected, self._died)
        except StartError as err:
            self._died(err.part, err.reason)
        except Exception as err:  # any error of Ray must be reported: the start must not hang
            logger.exception("workers could not be created")
            failed(f"{type(err).__name__}: {err}")

    def _start_failed(self, error: str) -> None:
        assert self._controller is not None
        self._tell(partial(self._controller.fail_start, error))

    def _retire(self, reason: str) -> None:
        """Another controller leads the workers: let go of them."""
        logger.warning("superseded: %s", reason)
        self._handoff.failure = f"superseded: {reason}"
        self._controller = None
        if self._server is not None:
            self._background.spawn(self._server.close())
        self._background.notify()

    async def _end(
        self,
        end: Callable[[], Awaitable[None]],
        ended: Callable[[Controller], Callable[[float], None]],
    ) -> None:
        """End workers, again after each error, until they have ended; then call ``ended``."""
        while self._controller is not None:
            try:
                await end()
            except SupersededError as err:
                self._retire(str(err))
            except Exception:  # any error of Ray
                logger.exception("workers could not be ended, trying again")
                await asyncio.sleep(_END_AGAIN_S)
            else:
                if self._controller is not None:
                    self._tell(ended(self._controller))
                break

    async def _tick_forever(self, controller: Controller) -> None:
        while self._leads(controller):
            await asyncio.sleep(_TICK_S)
            try:
                self._tell(controller.tick)
            except Exception:  # detection must continue
                logger.exception("a tick of the controller failed")
            for gateway in self._polls.take_gone(time.monotonic()):
                self._note(f"{gateway} is gone: it no longer asks", "its requests end")

    async def _watch_nodes(self, controller: Controller) -> None:
        """Drain the workers of nodes that will leave; fill their places afterwards."""
        while self._leads(controller):
            await asyncio.sleep(_NODES_S)
            try:
                leaving, nodes = await asyncio.to_thread(
                    lambda: (self._group.leaving(), self._group.resources())
                )
            except Exception as err:  # any error of Ray: the next round asks again
                logger.debug("the nodes cannot be listed: %s", err)
                continue
            for name in sorted(leaving):
                self._tell(partial(controller.draining.requested, name))
            self._tell(partial(controller.cluster.nodes_alive, ids_by_address(nodes)))

    def _leads(self, controller: Controller) -> bool:
        is_over = controller.cluster.state is ClusterState.STOPPED
        return self._controller is controller and not is_over

    def _died(self, name: str, reason: str) -> None:
        if self._controller is not None and name in self._controller.cluster.workers:
            self._tell(partial(self._controller.lost, {name: reason}))

    async def _fresh_cluster(self) -> Cluster | None:
        """The cluster with the current numbers of every worker; None before the start."""
        await self.restore()
        if self._controller is None:
            return None
        self._tell(self._controller.request_status)
        cluster = self._controller.cluster
        await self._background.wait(lambda: cluster.workers.status_complete, self._status_limit_s)
        return cluster

    async def _serving_controller(self) -> Controller:
        """Raises ``ConflictError`` before the start."""
        await self.restore()
        if self._controller is None:
            raise ConflictError(self._handoff.failure or "the cluster has not been started")
        return self._controller

    # ---- small things ---------------------------------------------------------------------

    def _make_controller(
        self,
        plan: StartPlan,
        members: Sequence[Member],
        *,
        notes: Mapping[str, Any],
        term: int,
    ) -> Controller:
        profile, config = notes.get("profile"), plan.config
        self._plan = plan
        self._profile = LoadProfile.from_dict(profile) if profile else None
        self._top_k = int(notes.get("top_k", 1))
        self._asked = notes.get("asked")
        now = time.monotonic()
        cluster = Cluster(
            members,
            plan.placement,
            model={"name": config.model.served_model_name, "path": config.model.path},
            load=config.load,
            now=now,
            num_slots=plan.num_slots,
            can_grow=plan.share.device == "cpu",
            term=term,
            identity=self.identity,
            host=self._address.rpartition(":")[0],
            wall_time_offset_s=time.time() - now,
            notes=notes,
        )
        controller = Controller(
            cluster,
            ControllerSettings.of(config),
            config=config,
            executor=self._planner,
            now=now,
            top_k=self._top_k,
        )
        self._traces = cluster_traces(config.observability)
        return controller

    def _snapshot(self) -> dict[str, Any]:
        mine: dict[str, Any] = {"controller_pid": os.getpid()}
        if self._controller is not None:
            return self._controller.snapshot() | mine
        if self._handoff.failure:
            is_under_way = self._handoff.is_under_way
            state = ClusterState.RECOVERING if is_under_way else ClusterState.STOPPED
            mine |= {"state": state.value, "error": self._handoff.failure}
        return _snapshot_before_start() | mine

    def _version(self) -> int:
        return self._controller.cluster.version if self._controller else 0


def _snapshot_before_start() -> dict[str, Any]:
    """``Controller.snapshot`` of a cluster that has no workers yet."""
    return {
        "version": 0,
        "schema": 1,
        "state": ClusterState.STARTING.value,
        "error": None,
        "mode": None,
        "mode_reason": "",
        "term": 0,
        "generation": 0,
        "placement_epoch": 0,
        "experts_complete": False,
        "model": dict.fromkeys(("name", "path", *MODEL_FACTS)),
        "rebalance": None,
        "workers": [],
        "gateway": [],
        "history": [],
    }
