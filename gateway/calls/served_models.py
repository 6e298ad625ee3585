"""The models of one gateway replica, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.config.gateway import GatewaySection
from cluster.core.errors import ModelNotFoundError
from cluster.core.process import count_cpus
from cluster.disk.threads import DiskThreads
from gateway.auth.auth import CALLER, KeyRing, make_key_rings
from gateway.calls.model_routes import ModelRoute
from gateway.calls.output_queue import CallRegistry
from gateway.cluster.table_follower import TableFollower
from gateway.core.errors import StorageTimeoutError
from gateway.core.tuning import GatewayTuning
from gateway.observability.metrics import GatewayMetrics
from gateway.offload.long_work import LongWork
from gateway.state.store import StateStore, open_store

if TYPE_CHECKING:
    from gateway.calls.gateway import Gateway


class ServedModels:
    """Finds the ``Gateway`` that serves a model name. The first model is the default.

    Hides the models that the key of the current request may not use.
    """

    def __init__(self) -> None:
        self._gateways: list[Gateway] = []
        self._routes: dict[str, ModelRoute] = {}
        self._has_been_ready = False
        self.awaits_table = False
        """Whether the replica must apply the table of models before it is ready."""
        self.table: TableFollower | None = None
        """Follows the table of models, which clients may change; None outside of Ray."""

    def __iter__(self) -> Iterator[Gateway]:
        """Yield the gateways of all models and revisions, also of those that get no new calls."""
        return iter(self._gateways)

    def __len__(self) -> int:
        return len(self._gateways)

    @property
    def usable_routes(self) -> list[ModelRoute]:
        """The models that the caller may use, wholly or by an adapter."""
        return [
            route
            for route in self._routes.values()
            if _may_use(route.name, route.name)
            or (route.revisions and any(map(route.knows, _names_of_caller())))
        ]

    @property
    def usable_metrics(self) -> list[GatewayMetrics]:
        """Metrics of the models that the caller may use, without duplicates."""
        gateways = (g for g in self._gateways if _may_use(g.model.name, g.model.name))
        return list(dict.fromkeys(gateway.metrics for gateway in gateways))

    @property
    def default(self) -> Gateway:
        """Gateway of the first model, without regard to the caller; ended if none serves."""
        routes = (route for route in self._routes.values() if route.revisions)
        first = next(routes, None)
        return self._gateways[0] if first is None else first.gateway

    def add(self, gateway: Gateway) -> None:
        """Add a gateway; the first one of a model serves it at once."""
        self._gateways.append(gateway)
        name = gateway.model.name
        if name not in self._routes:
            route = ModelRoute(name, gateway.revision, {gateway.revision: gateway})
            self._routes[name] = route

    def remove(self, gateway: Gateway) -> None:
        """Remove a gateway other than the first, which has the counts of the replica."""
        if gateway is not self._gateways[0]:
            self._gateways.remove(gateway)

    def route(self, name: str, active: str) -> ModelRoute:
        """Return the route of a model; a new one without revisions if there is none."""
        if name not in self._routes:
            self._routes[name] = ModelRoute(name, active, {})
        return self._routes[name]

    def keep_routes(self, names: Collection[str]) -> Collection[ModelRoute]:
        """End the routes of all other models; return the routes that are left."""
        for name in self._routes.keys() - set(names):
            self._routes.pop(name).end_wait()
        return self._routes.values()

    def route_of(self, name: str | None) -> ModelRoute:
        """Return the route of a model or adapter; of the first usable model for None.

        Raises ``ModelNotFoundError`` for a name that is unknown, or that the caller may not use.
        """
        named = self._routes.get(name or "")  # the name of a model is no adapter's
        for route in self._routes.values() if named is None else (named,):
            is_served = bool(route.revisions) or route.is_held
            if name is None and is_served and _may_use(route.name, route.name):
                return route
            if name is not None and route.knows(name) and _may_use(name, route.name):
                return route
        if name is None:
            raise ModelNotFoundError("no model that this key may use is served: name one")
        raise ModelNotFoundError(f"the model {name[:128]!r} does not exist")

    def find(self, name: str | None) -> Gateway:
        """Return the gateway of the active revision of ``route_of(name)``. Raises the same errors,
        and ``NotReadyError`` while no revision serves."""
        return self.route_of(name).gateway

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[Gateway]:
        """Yield ``find(name)``, which counts as running a call: it does not end meanwhile.

        Raises the same errors.
        """
        with contextlib.ExitStack() as held:
            gateway = self.find(name)
            gateway.count_call(held)
            yield gateway

    def end_waits(self) -> None:
        """Let the calls go on that wait for revisions, as the replica shuts down."""
        for route in self._routes.values():
            route.end_wait()

    def names(self) -> list[tuple[str, Gateway]]:
        """Return the models and adapters that the caller may use, each with its gateway."""
        return [
            (name, route.gateway)
            for route in self.usable_routes
            if route.revisions or route.standby
            for name in (route.name, *route.gateway.model.adapters.names())
            if _may_use(name, route.name)
        ]

    def not_ready_reasons(self, is_whole: bool = True) -> list[str]:
        """Return reasons why this replica cannot serve requests now; empty if it can.

        A replica becomes ready when all its models are. From then on it stays ready while any model
        is: requests for a lost model fail alone. See ``Readiness.not_ready_reasons``.
        """
        if self._gateways and self._gateways[0].readiness.is_leaving:
            return self._gateways[0].readiness.not_ready_reasons(is_whole)
        if self.awaits_table:
            return ["the revisions of the models are not known yet"]
        found = {
            route.name: []
            if route.is_held  # its requests wait
            else route.gateway.readiness.not_ready_reasons(is_whole)
            for route in self._routes.values()
            if route.revisions or route.is_held
        }
        if not found:
            return ["no model serves"]
        self._has_been_ready = self._has_been_ready or not any(found.values())
        if self._has_been_ready and not all(found.values()):
            return []
        if len(found) == 1:
            return next(iter(found.values()))
        return [f"{name}: {reason}" for name, reasons in found.items() for reason in reasons]


def _names_of_caller() -> tuple[str, ...]:
    """Return the model names to which the current request's key is limited; empty: to none."""
    caller = CALLER.get()
    return () if caller is None or caller.is_admin else caller.entry.models


def _may_use(name: str, model: str) -> bool:
    """Whether the current request's key may use ``name``: a model, or an adapter of ``model``."""
    names = _names_of_caller()
    return not names or name in names or model in names


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedParts:
    """What all models of one replica share."""

    keys: KeyRing
    """API keys of the public ports."""
    admin_keys: KeyRing
    """API keys of the admin ports."""
    long_work: LongWork
    state: StateStore | None
    """Store of clients' objects, such as responses; None if the state folder is disabled."""
    disk: DiskThreads
    """Threads that access the store ``state`` on disk for requests."""
    running: CallRegistry
    """Running calls of the replica."""
    models: ServedModels = field(default_factory=ServedModels)
    metrics: dict[str, GatewayMetrics] = field(default_factory=dict)
    """Metrics by ``GatewayMetrics.key``: a revision that returns continues its counts."""

    @classmethod
    def of(
        cls, section: GatewaySection, tuning: GatewayTuning, state: StateStore | None = None
    ) -> SharedParts:
        """Make the parts; without ``state``, open the configured store on the calling thread."""
        keys, admin_keys = make_key_rings(section)
        return cls(
            keys=keys,
            admin_keys=admin_keys,
            long_work=LongWork(),
            state=open_store(section) if state is None else state,
            disk=DiskThreads(
                "the state folder",
                tuning.disk_threads,
                tuning.disk_max_waiting,
                tuning.disk_limit_s,
                StorageTimeoutError,
            ),
            running=CallRegistry(count_cpus()),
        )
