"""Makes and ends the gateways of one replica as models and revisions come and go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cluster.config.cluster import ClusterConfig
from cluster.core.model_table import (
    FIRST_REVISION,
    ModelTable,
    Revision,
    RevisionState,
    cluster_id,
)
from cluster.tracing import logs
from cluster.tracing.disks import DiskMonitor
from gateway.calls.gateway import Gateway
from gateway.calls.served_models import SharedParts
from gateway.cluster.client import find_controller
from gateway.cluster.view import SnapshotFollower
from gateway.core.tuning import GatewayTuning
from gateway.engines.engine_pool import EnginePool
from gateway.engines.router import RoutingPolicy
from gateway.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_READY_LIMIT_S = 5.0
_READY_POLL_S = 0.05
_HOLD_LIMIT_S = 60.0
"""Seconds for which calls wait until this replica is connected to the next revision."""


@dataclass(slots=True)
class ModelSet:
    """The gateways of one replica, one for each fleet."""

    name: str
    """Name of the replica."""
    node: str
    """Address of its host."""
    tuning: GatewayTuning
    shared: SharedParts
    on_start: Callable[[Gateway], None] = lambda gateway: None
    """Called with each gateway before it follows its controller."""
    _fleets: dict[str, Gateway] = field(default_factory=dict)
    _connected: set[str] = field(default_factory=set)
    """Fleets to which this replica has been connected."""
    _hold_until_s: dict[str, float] = field(default_factory=dict)
    """By fleet, the monotonic time until which calls wait for it."""

    async def add_first(
        self, configs: Sequence[Mapping[str, Any]], table: ModelTable | None
    ) -> None:
        """Make the first gateways: for the active revisions of ``table``, to which others come.

        Without a table of this cluster, for the models with which the cluster starts, ``configs``.
        """
        if table is not None and _is_of_cluster(table, str(configs[0]["cluster_token"])):
            await self._add_active(table)
        if not self._fleets:
            for config in configs:
                gateway = await self.add(ClusterConfig.from_dict(config))
                route = self.shared.models.route(gateway.model.name, "")
                route.standby = route.standby or gateway

    async def _add_active(self, table: ModelTable) -> None:
        """Begin as the table says. The replica is not ready before it has applied a table."""
        self.shared.models.awaits_table = True
        for model in table.models:
            for revision in model.revisions:
                if (revision.name, revision.state) == (model.active, RevisionState.READY):
                    try:
                        await self.add(_settings(revision), revision.name)
                    except Exception:  # the other models must not wait for this one
                        logger.exception("revision %s cannot be served", revision.name)
            route = self.shared.models.route(model.name, model.active)
            standby = route.revisions.get(model.active)
            route.update(model.active, route.revisions, standby=standby, is_held=model.is_held)

    async def add(self, settings: ClusterConfig, revision: str = FIRST_REVISION) -> Gateway:
        """Make the gateway of a fleet."""
        tokenizer = await asyncio.to_thread(
            load_tokenizer, settings.model.path, settings.model.chat_template
        )
        disks = DiskMonitor(lambda: [logs.OUTPUT.folder])
        cluster = SnapshotFollower(
            partial(find_controller, settings.namespace),
            self.name,
            host=self.node,
            low_disks=lambda: disks.low(time.monotonic()),
        )
        policy = RoutingPolicy(settings.gateway.routing_policy)
        engines = EnginePool(settings.cluster_token, self.name, policy)
        gateway = Gateway(
            settings, tokenizer, cluster, engines, self.name, self.tuning, self.shared, revision
        )
        cluster.adapters = lambda: gateway.model.adapters.in_use
        self._fleets[settings.fleet] = gateway
        return gateway

    def start(self) -> None:
        """Begin to follow the controllers of the first models."""
        for gateway in self._fleets.values():
            self._start(gateway)

    def num_calls(self) -> dict[str, int]:
        """Return the number of calls on each fleet."""
        return {fleet: gateway.num_calls for fleet, gateway in self._fleets.items()}

    async def apply(self, table: ModelTable) -> bool:
        """Add and end gateways, and divide new calls among them, as the table says.

        A new revision gets calls once this replica is connected to its workers, or if it is to no
        other one; calls that wait for it go on waiting until then, for a time. Returns False if the
        table should be applied again, as a revision is not connected or cannot be served, or as an
        ended one has calls.
        """
        known = {revision.fleet: (model, revision) for model, revision in table}
        for fleet, (_, revision) in known.items():
            if revision.state is RevisionState.READY and fleet not in self._fleets:
                try:
                    await self._begin(revision)
                except Exception:  # other revisions must not wait for this one
                    logger.exception("revision %s cannot be served", revision.name)
        is_whole = all(r.fleet in self._fleets for _, r in table if r.state is RevisionState.READY)
        found = {f for f, g in self._fleets.items() if f in self._connected or _is_ready(g)}
        self._connected = found
        self._hold_until_s = {f: t for f, t in self._hold_until_s.items() if f in known}
        for model in table.models:
            ready = [
                one
                for one in model.revisions
                if one.state is RevisionState.READY and one.fleet in self._fleets
            ]
            connected = [one for one in ready if one.fleet in self._connected] or ready
            is_whole = is_whole and connected == ready
            serving = {one.name: self._fleets[one.fleet] for one in connected}
            route = self.shared.models.route(model.name, model.active)
            active = next((r for r in model.revisions if r.name == model.active), None)
            standby = None if active is None else self._fleets.get(active.fleet)
            is_held = model.is_held
            if route.is_held and active is not None and active.state is RevisionState.READY:
                is_held = is_held or self._waits_for(active.fleet)
            is_whole = is_whole and is_held == model.is_held
            if standby is None and is_held:  # the active revision returns in another fleet
                standby = route.standby or next(iter(route.revisions.values()), None)
            route.update(model.active, serving, model.canary, standby, is_held=is_held)
        routes = self.shared.models.keep_routes({model.name for model in table.models})
        standbys = [route.standby for route in routes]
        for fleet, gateway in list(self._fleets.items()):
            may_serve = fleet in known and known[fleet][1].may_serve
            if may_serve or gateway in standbys:
                continue
            if gateway.num_calls:
                is_whole = False
            else:
                await self._end(self._fleets.pop(fleet))
        self.shared.models.awaits_table = False
        return is_whole

    def _waits_for(self, fleet: str) -> bool:
        """Whether calls still wait until this replica is connected to a fleet."""
        limit_s = self._hold_until_s.setdefault(fleet, time.monotonic() + _HOLD_LIMIT_S)
        return fleet not in self._connected and time.monotonic() < limit_s

    async def close(self) -> None:
        """End all gateways."""
        for gateway in self._fleets.values():
            await gateway.engines.stop()
            await gateway.close()

    async def _begin(self, revision: Revision) -> None:
        """Make the gateway of a new revision; return when it is connected, or after a time."""
        gateway = await self.add(_settings(revision), revision.name)
        self._start(gateway)
        await _wait_ready(gateway)

    def _start(self, gateway: Gateway) -> None:
        self.on_start(gateway)
        gateway.cluster.start()

    async def _end(self, gateway: Gateway) -> None:
        """End the gateway of a fleet that has ended, or is about to.

        The first one stays without a fleet, as the servers of the replica use it.
        """
        self.shared.models.remove(gateway)
        if all(other.metrics is not gateway.metrics for other in self.shared.models):
            del self.shared.metrics[gateway.metrics.key]
        await gateway.cluster.end()
        gateway.model.adapters.follow({})
        await gateway.engines.stop()
        await gateway.prompts.stop()


def _settings(revision: Revision) -> ClusterConfig:
    return ClusterConfig.from_dict(revision.plan["config"])


def _is_of_cluster(table: ModelTable, token: str) -> bool:
    """Whether a table belongs to the cluster in which a revision has this cluster token."""
    tokens = (revision.plan["config"]["cluster_token"] for _, revision in table)
    return table.cluster == cluster_id(token) or token in tokens


def _is_ready(gateway: Gateway) -> bool:
    """Whether a gateway can serve calls now; a leaving one cannot tell, and serves them."""
    return gateway.readiness.is_leaving or not gateway.readiness.not_ready_reasons()


async def _wait_ready(gateway: Gateway) -> None:
    deadline_s = time.monotonic() + _READY_LIMIT_S
    while (reasons := gateway.readiness.not_ready_reasons()) and time.monotonic() < deadline_s:
        await asyncio.sleep(_READY_POLL_S)
    if reasons:
        logger.warning("revision %s is not ready yet: %s", gateway.revision, "; ".join(reasons))
