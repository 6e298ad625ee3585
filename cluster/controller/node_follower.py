"""Begins scale operations when labelled nodes join or leave the Ray cluster.

``NodeFollowingPolicy`` decides; ``Scaling`` carries out one operation, as for a client.
``Draining`` drains the workers of nodes that leave and removes their places.

A scale operation of a client also sets the numbers of workers: nodes present at the end of the
operation no longer change these numbers, and the next node that registers adds workers. A restarted
controller gets the nodes already accounted for from the workers (``ControllerMemory.known_nodes``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count

from cluster.controller.cluster import Cluster
from cluster.controller.operations import Operation, OperationState
from cluster.controller.scale import Scaling
from cluster.controller.scale_operation import ScaleCommand
from cluster.core.errors import ConflictError, RequestError
from cluster.policy.node_following import FollowDecision, FollowedNode, NodeFollowingPolicy

LIMIT_S = 600.0
"""Time limit, in seconds, of scale operations that follow nodes: as long as a worker may load."""
_OWN = "follow-nodes-"
"""Prefix of the ``request_id`` of the scale operations that follow nodes."""


class NodeFollower:
    """Adapts the numbers of workers to the labelled nodes. Owned by the controller."""

    def __init__(self, cluster: Cluster, scaling: Scaling) -> None:
        self._cluster = cluster
        self._scaling = scaling
        self._policy = NodeFollowingPolicy()
        self._numbers = count(1)
        self._operation: Operation | None = None
        """The running scale operation that this follower began; None without one."""
        self._nodes: frozenset[str] = frozenset()
        """Ids of the nodes for which ``_operation`` began."""
        self._is_withdrawn = False
        """Whether this follower itself cancelled ``_operation``."""
        self._of_client: Operation | None = None
        """The running scale operation of a client; None without one."""

    def observe(self, nodes: Sequence[FollowedNode], now: float) -> None:
        """Process the list of live nodes with a role label. Called every half second."""
        cluster = self._cluster
        if not (cluster.config.workers.follow_nodes and cluster.can_accept_operations):
            return
        alive = {r.name for r in cluster.workers.alive()}
        nodes = [replace(n, workers=tuple(w for w in n.workers if w in alive)) for n in nodes]
        self._account(cluster.known_nodes & {n.node_id for n in nodes})
        self._watch_operations(nodes, now)
        if cluster.runs and cluster.operations.running is None:
            self._follow(nodes, now)

    def _watch_operations(self, nodes: Sequence[FollowedNode], now: float) -> None:
        """Mark nodes as accounted for when an operation that concerns them ends."""
        cluster, running = self._cluster, self._cluster.operations.running
        if running is not None and running.request_id.startswith(_OWN):
            self._operation = running
            if cluster.scale is not None:
                self._nodes = cluster.scale.command.nodes
        elif running is not None and running.kind == "scale":
            self._of_client = running
        if cluster.drain is not None and cluster.drain.removes_places:
            drained = set(cluster.drain.names)
            self._account_for(n.node_id for n in nodes if drained & set(n.workers))
        staying = {n.node_id for n in nodes if not n.leaves}
        if self._of_client is not None and not self._of_client.is_running:
            if self._of_client.state is not OperationState.FAILED:
                self._account_for(staying)
            self._of_client = None
        if (own := self._operation) is None:
            return
        if own.is_running:
            self._withdraw(own, staying, now)
        else:
            self._ended(own, staying, now)

    def _withdraw(self, own: Operation, staying: set[str], now: float) -> None:
        """Cancel the scale operation ``own`` if one of its nodes left before new workers served."""
        if self._cluster.scale is not None and self._nodes - staying:
            with suppress(ConflictError):
                self._scaling.cancel(own, now)
                self._is_withdrawn = True

    def _ended(self, own: Operation, staying: set[str], now: float) -> None:
        if own.state is OperationState.SUCCEEDED:
            self._policy.succeeded()
            self._account_for(self._nodes & staying)
        elif own.state is OperationState.FAILED:
            self._policy.failed(now)
        elif not self._is_withdrawn:  # a client does not want these workers
            self._account_for(staying)
        self._operation, self._nodes, self._is_withdrawn = None, frozenset(), False

    def _follow(self, nodes: Sequence[FollowedNode], now: float) -> None:
        cluster = self._cluster
        most = min((b.num_experts for b in cluster.desired.banks), default=0)
        roles = cluster.places.roles()
        decision = self._policy.decide(nodes, roles, cluster.known_nodes, now, most)
        if decision is not None and decision.wanted:
            self._order(decision, now)
        elif decision is not None:
            for address in decision.too_small:
                cluster.note(f"node {address} registered", "no worker fits there", now)
            self._account_for(decision.nodes)

    def _order(self, decision: FollowDecision, now: float) -> None:
        cluster, wanted = self._cluster, decision.wanted
        order = ScaleCommand(
            attention=wanted.get("attention"),
            expert=wanted.get("expert", wanted.get("colocated")),
            limit_s=LIMIT_S,
            request_id=f"{_OWN}{cluster.term}.{next(self._numbers)}",
            cause=decision.reason,
            nodes=decision.nodes,
        )
        try:
            operation = self._scaling.begin(order, now)
        except (ConflictError, RequestError) as err:
            self._policy.failed(now)
            cluster.note(decision.reason, f"continue: {err}", now)
        else:
            self._operation, self._nodes = operation, decision.nodes
            cluster.note(decision.reason, f"{operation.id} begins", now)

    def _account_for(self, nodes: Iterable[str]) -> None:
        self._account(self._cluster.known_nodes | set(nodes))

    def _account(self, known: frozenset[str]) -> None:
        if known != self._cluster.known_nodes:
            self._cluster.known_nodes = known
            self._cluster.send_snapshot()
