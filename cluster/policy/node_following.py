"""Node following: computes the numbers of workers from the nodes that are labelled for a role.

A node is new until no other node has registered for a while and the numbers include its workers.
Then the node is accounted for and changes no number, so that a client's scale command stays in
force until other nodes register. Pure; times are arguments.

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
"""Seconds without another new node after which new nodes are used, so that nodes that register
together cause one scale command, and a node that leaves immediately causes no command."""
MAX_SETTLE_S = 60.0
"""Longest time, in seconds, for which new nodes wait for further nodes before they are used."""
LOST_S = 300.0
"""Seconds for which a place of a lost node waits for another node, before it is removed."""
RETRY_S = 30.0
"""Pause after a failed scale command, in seconds; doubled after each further failure."""
MAX_RETRY_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowedNode:
    """A live Ray node that is labelled for a role of workers."""

    node_id: str
    """Ray's id of the node; a host that returns gets another id."""
    address: str
    """Address of the node, for texts to operators."""
    role: Role
    room: int
    """Number of workers that fit on the node if it is empty."""
    workers: tuple[str, ...] = ()
    """Names of the workers on the node."""
    leaves: bool = False
    """Whether Ray drains the node, because it will leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowDecision:
    """Decision to change the numbers of workers, or to account for new nodes without a change."""

    wanted: dict[Role, int]
    """New numbers of workers, for the roles whose number changes; empty if none does."""
    reason: str = ""
    """Reason of the decision, as a text for operators."""
    nodes: frozenset[str] = frozenset()
    """Ids of the new nodes, which are accounted for once the numbers of workers are reached."""
    too_small: tuple[str, ...] = ()
    """Addresses of the new nodes on which no worker fits."""


def followed_nodes(
    nodes: Sequence[NodeResources],
    share: WorkerShare,
    roles: Collection[Role],
    homes: Mapping[str, str],
    leaving: Collection[str],
) -> tuple[FollowedNode, ...]:
    """Return the nodes that are labelled for one of ``roles``.

    ``share`` are the resources of one worker, ``homes`` the nodes of the workers (name -> node id),
    and ``leaving`` the ids of nodes that Ray drains.
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
    """Decides the numbers of workers from the labelled nodes. Owned by the controller."""

    _new_since: dict[str, float] = field(default_factory=dict)
    """Id of a new node -> time at which the node first appeared."""
    _waits_since: dict[str, float] = field(default_factory=dict)
    """Place without a worker on a live node -> time at which the place began to wait for one."""
    _departed: set[str] = field(default_factory=set)
    """Places whose last worker was on a node that Ray drained."""
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
        """Decide new numbers of workers; None if nothing changes yet.

        ``nodes`` are the live labelled nodes; ``places`` the places of the cluster with their
        roles; ``known`` the ids of nodes that are accounted for; ``most_experts`` limits the number
        of workers that hold experts, 0 for no limit.
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
        """Record that the numbers of workers of the last decision are reached."""
        self._not_before, self._retry_s = 0.0, RETRY_S

    def failed(self, now: float) -> None:
        """Record that the scale command of the last decision was refused or failed.

        ``decide`` then makes no decision for a pause.
        """
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
        """Return the places among ``waiting`` for which no other node is expected any more."""
        limits = {p: SETTLE_S if p in self._departed else LOST_S for p in waiting}
        return [p for p, limit_s in limits.items() if now - self._waits_since[p] >= limit_s]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pool:
    """Places of one role, and the room for their workers on the nodes of this role."""

    size: int
    """Number of places of the role."""
    waiting: tuple[str, ...]
    """Names of the places without a worker on any labelled live node."""
    more: int
    """Number of workers that fit on new nodes, after the waiting places are filled."""
    missing: int
    """Number of waiting places that fit on no node."""
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
