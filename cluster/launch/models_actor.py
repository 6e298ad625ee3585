"""The actor that keeps the table of models: loads, replaces and retires revisions.

Gateways follow the table (``wait_table``) and report with each poll how many calls they run on each
fleet. A fleet ends only when every gateway knows that it gets no new calls, and runs none on it.
The table is stored in Ray before each step, so that a restarted actor continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Protocol

from cluster.actors.tasks import Background
from cluster.core.checks import check
from cluster.core.codec import from_plain, to_plain
from cluster.core.errors import (
    CheckpointError,
    ConfigError,
    ExpertMeshError,
    NotReadyError,
    RequestError,
    first_line,
)
from cluster.core.fleets import MODELS_NAME, NAMESPACE, namespace_of
from cluster.core.model_table import (
    FIRST_REVISION,
    LOADING_STATES,
    ModelTable,
    Revision,
    RevisionState,
    ServedModelEntry,
    check_percent,
    cluster_id,
)
from cluster.launch import gateway_calls
from cluster.launch.gateway_calls import GatewayCalls
from cluster.launch.model_plan import ModelPlan
from cluster.launch.ray_fleets import LoadOrder, RayFleets, as_plan, renamed
from cluster.tracing import logs

logger = logging.getLogger(__name__)

_HEAD_SHARE = 0.001
_TICK_S = 0.2
_RETRY_S = 5.0
_MAX_RETURNS = 3
"""Maximum number of starts of a replaced revision that is to serve again."""


class Fleets(Protocol):
    """What the actor needs of ``RayFleets``; its methods block."""

    def plan(
        self,
        order: LoadOrder,
        first: ModelPlan,
        base: ModelPlan | None,
        others: Any,
        fleet: str,
    ) -> dict[str, Any]: ...

    def start(self, plan: Mapping[str, Any], on_progress: Callable[[int, int], None]) -> None: ...

    def stop(self, namespace: str) -> None: ...

    def keep(self, table: Mapping[str, Any]) -> None: ...

    def kept(self) -> dict[str, Any] | None: ...


class ModelsActor:
    """Async Ray actor that keeps the table of models. There is one in a cluster."""

    def __init__(
        self, table: Mapping[str, Any], fleets: Fleets, *, has_process: bool = False
    ) -> None:
        """``table``: the table at the start of the cluster.

        ``has_process``: whether the actor has a process of its own, where it sets up logging.
        """
        if has_process:
            logs.set_up("models")
        self._fleets = fleets
        self._table = from_plain(dict(table), ModelTable)
        self._stored = dict(table)
        """The table as it was last stored, which gateways get: a restarted actor knows it."""
        self._first = as_plan(self._table.models[0].revisions[0].plan)
        self._background = Background()
        self._gateways = GatewayCalls(time.monotonic(), gateway_calls.SETTLE_S)
        self._busy: set[str] = set()
        self._returns: Counter[str] = Counter()
        """Number of failed starts of a replaced revision that is to serve again, by model."""
        self._loading, self._restoring = asyncio.Lock(), asyncio.Lock()
        self._keeping = asyncio.Lock()
        self._is_restored = False

    async def wait_table(
        self, known_version: int, timeout_s: float, gateway: str, calls: dict[str, int]
    ) -> dict[str, Any] | None:
        """Return the table once its version differs from ``known_version``; None after a time.

        ``calls``: number of calls that the gateway runs on each fleet.
        """
        await self._restore()
        self._gateways.poll(gateway, known_version, calls, time.monotonic())
        self._background.notify()
        await self._background.wait(lambda: self._stored["version"] != known_version, timeout_s)
        return None if self._stored["version"] == known_version else self._stored

    async def load(self, order: dict[str, Any]) -> dict[str, Any]:
        """Begin to load a revision; return the table.

        Raises ``RequestError`` that names the field, and ``ConflictError``.
        """
        await self._restore()
        with _as_request_errors():
            return await self._load(order)

    async def _load(self, order: dict[str, Any]) -> dict[str, Any]:
        wanted = from_plain(order, LoadOrder)
        async with self._loading:
            is_canary = bool(wanted.percent or wanted.keys)
            named = wanted.model, wanted.revision, wanted.in_place, is_canary
            self._table.check_load(*named)
            check_percent(wanted.percent)
            rule = "must be left out with in_place: there is no room for a canary"
            check(not (wanted.in_place and wanted.percent), "percent", wanted.percent, rule)
            check(not (wanted.in_place and wanted.keys), "keys", wanted.keys, rule)
            fleet = self._table.new_fleet()
            others = [
                as_plan(revision.plan)
                for model, revision in self._table
                if revision.state in _RUNNING
                if not (
                    wanted.in_place and (model.name, model.active) == (wanted.model, revision.name)
                )
            ]
            base = self._active_plan(wanted.model)
            plan = await asyncio.to_thread(
                self._fleets.plan, wanted, self._first, base, others, fleet
            )
            self._table.check_load(*named)
            is_known = any(one.name == wanted.model for one in self._table.models)
            added = self._table.add(wanted.model, wanted.revision, fleet, plan, wanted.in_place)
            if is_canary and is_known:
                self._table.set_canary(wanted.model, added.name, wanted.percent, wanted.keys)
            return await self._commit()

    async def change(self, kind: str, **details: Any) -> dict[str, Any]:
        """Run ``promote``, ``rollback``, ``unload`` or ``set_canary`` of the table; return it.

        Raises ``RequestError`` that names the field, and ``ConflictError``.
        """
        await self._restore()
        with _as_request_errors():
            change = getattr(self._table, kind)(**details)
        if isinstance(change, Revision):  # it takes its place again, in a new fleet
            change.fleet = self._table.new_fleet()
            change.plan = renamed(change.plan, change.fleet)
        return await self._commit()

    async def table(self) -> dict[str, Any]:
        """Return the table."""
        await self._restore()
        return dict(to_plain(self._table))

    async def active_fleets(self) -> tuple[list[str], bool]:
        """Return the fleets of the active revisions that are ready, and whether one is loading."""
        await self._restore()
        ready = [revision.fleet for _, revision in self._table.ready_actives()]
        return ready, any(revision.state in LOADING_STATES for _, revision in self._table)

    async def _restore(self) -> None:
        """Continue with the stored table, if this actor was restarted."""
        async with self._restoring:
            if self._is_restored:
                return
            kept = await asyncio.to_thread(self._fleets.kept)
            if kept is not None and kept.get("cluster") == self._table.cluster:
                self._table, self._stored = from_plain(kept, ModelTable), kept
                self._gateways = GatewayCalls(time.monotonic(), gateway_calls.SILENCE_S)
            self._is_restored = True
        self._reconcile()

    async def _commit(self) -> dict[str, Any]:
        """Store the table, wake the gateways, and begin the work that it needs; return it.

        If it cannot be stored, raises the error, and tries again later.
        """
        async with self._keeping:
            plain = dict(to_plain(self._table))
            try:
                await asyncio.to_thread(self._fleets.keep, plain)
            except BaseException:
                self._background.spawn(self._commit_later())
                raise
            self._stored = plain
        self._background.notify()
        self._reconcile()
        return plain

    async def _commit_later(self) -> None:
        await asyncio.sleep(_RETRY_S)
        try:
            await self._commit()
        except Exception:  # it is tried again
            logger.exception("the table of models could not be stored")

    def _reconcile(self) -> None:
        """Begin the work for each revision that is not in a final state."""
        work = {
            RevisionState.WAITING: self._replace,
            RevisionState.LOADING: self._start,
            RevisionState.RETIRING: self._retire,
        }
        for entry, revision in self._table:
            if revision.state in work and _id_of(entry, revision) not in self._busy:
                self._busy.add(_id_of(entry, revision))
                self._background.spawn(self._work(entry, revision, work[revision.state]))

    async def _work(self, entry: ServedModelEntry, revision: Revision, run: _Work) -> None:
        try:
            await run(entry, revision)
        except Exception:  # any error of Ray
            logger.exception("revision %s of %s is tried again", revision.name, entry.name)
            await asyncio.sleep(_RETRY_S)
        finally:
            self._busy.discard(_id_of(entry, revision))
        try:
            await self._commit()
        except Exception:  # it is tried again
            logger.exception("the table of models could not be stored")

    async def _start(self, entry: ServedModelEntry, revision: Revision) -> None:
        """Start the fleet of a revision, which then serves or has failed."""
        if entry.is_held:  # an actor that ended before may have left its fleet
            for other in entry.revisions:
                if other.state is RevisionState.STOPPED:
                    await asyncio.to_thread(self._fleets.stop, namespace_of(other.fleet))
        loop = asyncio.get_running_loop()

        def progress(loaded: int, total: int) -> None:
            loop.call_soon_threadsafe(self._progressed, revision, loaded, total)

        error = ""
        try:
            await asyncio.to_thread(self._fleets.start, revision.plan, progress)
        except Exception as err:  # also an error of Ray
            error = str(err) if isinstance(err, ExpertMeshError) else first_line(err)
            logger.warning("revision %s of %s failed: %s", revision.name, entry.name, error)
            await asyncio.to_thread(self._fleets.stop, namespace_of(revision.fleet))
        if revision.state is RevisionState.RETIRING:
            return  # unloaded meanwhile
        if not error:
            self._returns.pop(entry.name, None)
            self._table.set_state(entry, revision, RevisionState.READY)
            if entry.is_held:
                self._table.release(entry, revision)
            return
        if entry.canary is not None and entry.canary.revision == revision.name:
            entry.canary = None
        self._table.set_state(entry, revision, RevisionState.FAILED, error)
        if entry.is_held:
            await self._return_to_active(entry, revision)

    async def _return_to_active(self, entry: ServedModelEntry, failed: Revision) -> None:
        """Load the replaced revision again; if that fails repeatedly, end the wait of requests."""
        active = entry.find(entry.active)
        self._returns[entry.name] += active is failed
        if active.state is RevisionState.READY or self._returns[entry.name] >= _MAX_RETURNS:
            del self._returns[entry.name]
            self._table.release(entry, active)
        else:
            active.fleet = self._table.new_fleet()
            active.plan = renamed(active.plan, active.fleet)
            self._table.set_state(entry, active, RevisionState.LOADING)
            if active is failed:  # it starts when this work has ended
                await asyncio.sleep(_RETRY_S)

    async def _replace(self, entry: ServedModelEntry, revision: Revision) -> None:
        """Wait until the active revision has no calls, end its fleet, and load ``revision``."""
        active = entry.find(entry.active)
        await self._calls_end(active.fleet)
        if revision.state is not RevisionState.WAITING:
            return
        self._table.set_state(entry, active, RevisionState.STOPPED)
        self._table.set_state(entry, revision, RevisionState.LOADING)  # ``_start`` ends the fleet

    async def _retire(self, entry: ServedModelEntry, revision: Revision) -> None:
        """Wait until a revision has no calls, end its fleet, and remove it from the table."""
        await self._calls_end(revision.fleet)
        await asyncio.to_thread(self._fleets.stop, namespace_of(revision.fleet))
        self._table.remove(entry, revision)

    async def _calls_end(self, fleet: str) -> None:
        """Wait until every gateway knows the current table, and has no call on a fleet."""
        version = self._table.version
        while not self._gateways.have_ended(fleet, version, time.monotonic()):
            await self._background.wait(lambda: False, _TICK_S)

    def _progressed(self, revision: Revision, loaded: int, total: int) -> None:
        if (revision.loaded_bytes, revision.total_bytes) != (loaded, total):
            revision.loaded_bytes, revision.total_bytes = loaded, total

    def _active_plan(self, model: str) -> ModelPlan | None:
        for entry in self._table.models:
            if entry.name == model:
                return as_plan(entry.find(entry.active).plan)
        return None


@contextlib.contextmanager
def _as_request_errors() -> Iterator[None]:
    """Convert errors of settings and checkpoints to errors of the request."""
    try:
        yield
    except ConfigError as err:
        raise RequestError(str(err), err.field) from err
    except CheckpointError as err:
        raise RequestError(str(err), "path") from err


def create_models_actor(
    models: Sequence[ModelPlan], selector: Mapping[str, str], start_limit_s: float
) -> None:
    """Create the detached actor of a cluster that serves ``models``, unless it exists.

    ``selector``: labels of the nodes on which it and controllers may run; empty: Ray's head node.
    """
    import ray

    from cluster.actors.ray_tools import HEAD_NODE

    table = ModelTable(
        models=[_first_entry(model) for model in models],
        cluster=cluster_id(models[0].config.cluster_token),
        num_fleets=len(models),
    )
    on_head = {"resources": {HEAD_NODE: _HEAD_SHARE}}
    where: dict[str, Any] = {"label_selector": dict(selector)} if selector else on_head
    actor: Any = ray.remote(ModelsActor)
    actor.options(
        name=MODELS_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        **where,
    ).remote(to_plain(table), RayFleets(dict(selector), start_limit_s), has_process=True)


def ask_models_actor(method: str, *arguments: Any, limit_s: float) -> Any:
    """Call a method of the actor and return its result. Raises ``NotReadyError``."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        actor: Any = ray.get_actor(MODELS_NAME, namespace=NAMESPACE)
        return ray.get(getattr(actor, method).remote(*arguments), timeout=limit_s)
    except (ValueError, RayError, GetTimeoutError) as err:
        raise NotReadyError(f"the table of models cannot be read: {first_line(err)}") from err


def _first_entry(model: ModelPlan) -> ServedModelEntry:
    plan = ModelPlan(config=model.config, facts=model.facts, profile=model.profile)
    first = Revision(FIRST_REVISION, model.config.fleet, to_plain(plan), RevisionState.READY)
    return ServedModelEntry(model.config.model.served_model_name, FIRST_REVISION, [first])


_Work = Callable[[ServedModelEntry, Revision], Coroutine[Any, Any, None]]
_RUNNING = (RevisionState.READY, *LOADING_STATES)
"""States of revisions that serve, or may soon."""


def _id_of(entry: ServedModelEntry, revision: Revision) -> str:
    return f"{entry.name}\0{revision.name}"
