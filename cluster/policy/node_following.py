"""Node following: computes the numbers of workers from the nodes that are labelled for a role.

A node is new until no other one has registered for a while and the numbers include its workers (it
is accounted for). Then it changes no number, so that a client's scale command stays in force until
other nodes register. Pure; times are arguments.

    new nodes, then none for SETTLE_S   add the workers that fit on them, minus the places that wait
                                        for resources and do not fit on known nodes
    a node leaves                       ``Draining`` drains its workers and removes their places;
                                        places of workers lost before are removed here
    a node is lost                      its places wait for another node for LOST_S

Example with one expert worker per node: a node is lost and another one registers: the waiting
worker starts there, and the numbers do not change. If two register, one worker is added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.config.resources import NodeResources, WorkerShare, num_fitting_workers
from cluster.core.topology import Role
from cluster.policy.places import place_of

SETTLE_S = 10.0
"""Time without another new node after which new nodes are used, so that nodes that register
together cause one scale command, and a node that leaves immediately causes none."""
MAX_SETTLE_S = 60.0
"""Longest wait for new nodes to settle."""
LOST_S = 300.0
"""Time for which a place waits for a replacement of a lost node."""
RETRY_S = 30.0
"""Pause after a failed scale command; doubled each time."""
MAX_RETRY_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowedNode:
    """A live node that is labelled for a role of workers."""

    node_id: str
    """Ray's id; a host that returns gets another one."""
    address: str
    """Address, for display."""
    role: Role
    room: int
    """Number of workers that fit on the empty node."""
    workers: tuple[str, ...] = ()
    """Workers on the node."""
    leaves: bool = False
    """Whether Ray drains the node, because it will leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowDecision:
    """New numbers of workers, which the controller should reach."""

    wanted: dict[Role, int]
    """New numbers of workers, for the roles whose number changes."""
    reason: str = ""
    """Reason, for display."""
    nodes: frozenset[str] = frozenset()
    """Ids of nodes that are accounted for once these numbers are reached."""
    too_small: tuple[str, ...] = ()
    """Addresses of those nodes on which no worker fits."""


def followed_nodes(
    nodes: Sequence[NodeResources],
    share: WorkerShare,
    roles: Collection[Role],
    homes: Mapping[str, str],
    leaving: Collection[str],
) -> tuple[FollowedNode, ...]:
    """Return the nodes that are labelled for one of these roles.

    ``homes`` are the nodes of the workers (name -> id), ``leaving`` ids of nodes that Ray drains.
    """
    kinds: dict[str, Role] = {role: role for role in roles}
    return tuple(
        FollowedNode(
            node_id=node.node_id,
            address=node.address,
            role=kinds[node.labels.role],
            room=num_fitting_workers(node, share),
            workers=tuple(sorted(w for w, home in homes.items() if home == node.node_id)),
            leaves=node.node_id in leaving,
        )
        for node in nodes
        if node.labels.role in kinds
    )


@dataclass(slots=True)
class NodeFollowingPolicy:
    """Decides the numbers of workers from the nodes. Owned by the controller."""

    _new_since: dict[str, float] = field(default_factory=dict)
    """Ids of new nodes -> time of their first appearance."""
    _waits_since: dict[str, float] = field(default_factory=dict)
    """Places whose worker is not on a remaining node -> start of their wait."""
    _departed: set[str] = field(default_factory=set)
    """Places whose worker was on a node that was drained."""
    _not_before: float = 0.0
    _retry_s: float = RETRY_S

    def decide(
        self,
        nodes: Sequence[FollowedNode],
        places: Mapping[str, Role],
        known: Collection[str],
        now: float,
        most_experts: int = 0,
    ) -> FollowDecision | None:
        """Return the decision; None if no number changes yet.

        ``places`` are the places of the cluster by name; ``known`` are ids of nodes that are
        accounted for; ``most_experts`` limits the workers that hold experts, 0 for no limit.
        """
        self._look(nodes, places, known, now)
        if now < self._not_before:
            return None
        new = frozenset(self._new_since) if self._are_settled(now) else frozenset()
        wanted, reasons = dict[Role, int](), list[str]()
        for role in sorted({node.role for node in nodes} | set(places.values())):
            own = [n for n in nodes if n.role == role]
            ours = [p for p, r in places.items() if r == role]
            pool = _Pool.of(own, ours, self._waits_since.keys() & ours, new, known)
            most = most_experts if most_experts and role != "attention" else pool.size + pool.more
            more = max(min(pool.more, most - pool.size), 0)
            gone = min(pool.missing, len(self._given_up(pool.waiting, now)), pool.size - 1)
            if more:
                wanted[role] = pool.size + more
                reasons += [f"node {a} registered" for a in pool.addresses]
            elif gone > 0:
                wanted[role] = pool.size - gone
                reasons.append(f"no node is left for {gone} {role} worker{'s' * (gone > 1)}")
        if not (wanted or new):
            return None
        small = tuple(n.address for n in nodes if n.node_id in new and n.room == 0)
        return FollowDecision(wanted=wanted, reason=", ".join(reasons), nodes=new, too_small=small)

    def succeeded(self) -> None:
        """Record that the number of workers of the last decision is reached."""
        self._not_before, self._retry_s = 0.0, RETRY_S

    def failed(self, now: float) -> None:
        """Record that the command was refused or failed: decide again after a pause."""
        self._not_before = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)

    def _look(
        self,
        nodes: Sequence[FollowedNode],
        places: Mapping[str, Role],
        known: Collection[str],
        now: float,
    ) -> None:
        new = [n.node_id for n in nodes if not (n.leaves or n.node_id in known)]
        self._new_since = {n: self._new_since.get(n, now) for n in new}
        held = {place_of(w) for n in nodes if not n.leaves for w in n.workers}
        leaving = {place_of(w) for n in nodes if n.leaves for w in n.workers}
        self._departed = (self._departed | leaving) & (places.keys() - held)
        waiting = places.keys() - held - leaving
        self._waits_since = {p: self._waits_since.get(p, now) for p in waiting}

    def _are_settled(self, now: float) -> bool:
        times = self._new_since.values()
        return bool(times) and (now - max(times) >= SETTLE_S or now - min(times) >= MAX_SETTLE_S)

    def _given_up(self, waiting: Iterable[str], now: float) -> list[str]:
        """Return the waiting places for which no other node is expected."""
        limits = {p: SETTLE_S if p in self._departed else LOST_S for p in waiting}
        return [p for p, limit_s in limits.items() if now - self._waits_since[p] >= limit_s]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pool:
    """The nodes and places of one role."""

    size: int
    """Number of places."""
    waiting: tuple[str, ...]
    """Places without a worker, and places whose worker's node leaves."""
    more: int
    """Number of workers that fit on the new nodes, beyond the waiting places."""
    missing: int
    """Waiting places that fit on no node."""
    addresses: tuple[str, ...]
    """Addresses of new nodes on which a worker fits."""

    @classmethod
    def of(
        cls,
        nodes: Sequence[FollowedNode],
        places: Collection[str],
        waiting: Collection[str],
        new: Collection[str],
        known: Collection[str],
    ) -> _Pool:
        spare = {
            n.node_id: max(n.room - sum(place_of(w) in places for w in n.workers), 0)
            for n in nodes
            if not n.leaves
        }
        on_known = sum(free for node, free in spare.items() if node in known)
        on_new = sum(free for node, free in spare.items() if node in new)
        return cls(
            size=len(places),
            waiting=tuple(sorted(waiting)),
            more=max(on_new - max(len(waiting) - on_known, 0), 0),
            missing=max(len(waiting) - sum(spare.values()), 0),
            addresses=tuple(n.address for n in nodes if n.node_id in new and n.room),
        )
