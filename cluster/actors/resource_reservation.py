"""Reserves resources for workers: a Ray placement group with one bundle for each worker.

A place (position for a worker) that scaling adds has a placement group of its own as long as the
place exists.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import ray_tools
from cluster.config.resources import NodeResources, WorkerShare, resolved_share
from cluster.config.workers import WorkersSection
from cluster.core.errors import StartError
from cluster.core.fleets import NAMESPACE, workers_group
from cluster.core.node_labels import selector_for
from cluster.core.topology import Member, Role, holds_experts
from cluster.policy.places import place_name

ANY_BUNDLE = -1
_FREE_SHARE_S = 2.0
"""Seconds to wait for Ray to reserve a CPU share for a worker that scaling adds."""


@dataclass(slots=True)
class ResourceReservation:
    """Ray resources reserved for one cluster's workers. Methods that query or change them block."""

    namespace: str = NAMESPACE
    """Ray namespace of the fleet."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Ray's node id by worker name, for the workers that ``reserve`` has placed; empty in a
    restarted controller.
    """
    _group: PlacementGroup | None = None
    _added: dict[str, PlacementGroup] = field(default_factory=dict)
    """Placement group by place name, for worker places that scaling has added."""
    _bundles: dict[str, int] = field(default_factory=dict)
    """Placement group bundle index by worker name, for the initial workers of the cluster."""
    _roles: list[Role] = field(default_factory=list)
    """Worker role of each bundle, by bundle index; empty if no node is labelled for a role."""

    def reserve(self, workers: WorkersSection, limit_s: float) -> tuple[Member, ...]:
        """Reserve resources for all workers, spread over the nodes; return the workers.

        Ranks are in the order of nodes. Raises ``StartError`` if the resources are not available
        within ``limit_s`` seconds.
        """
        ray_tools.remove_placement_groups(self.namespace)
        share = resolved_share(workers)
        roles = [role for role, count in workers.pools.items() for _ in range(count)]
        places = [node.labels for node in ray_tools.cluster_nodes(is_strict=True)]
        self._roles = roles if any(place.role for place in places) else []
        self._group = placement_group(
            [_bundle(share)] * len(roles),
            strategy="SPREAD",
            name=workers_group(self.namespace),
            lifetime="detached",
            bundle_label_selector=[selector_for(r, places) for r in self._roles] or None,
        )
        if not self._group.wait(limit_s):
            ray_tools.remove_placement_groups(self.namespace)
            raise StartError("worker group", _no_room_text(len(roles), share, limit_s))
        table = placement_group_table(self._group)["bundles_to_node_id"]
        nodes = {n.node_id: (place, n) for place, n in enumerate(ray_tools.cluster_nodes())}
        members = []
        for role in workers.pools:
            own = [(*nodes[str(table[b])], b) for b, r in enumerate(roles) if r == role]
            for rank, (_, node, number) in enumerate(sorted(own, key=lambda found: found[0])):
                member = _member(role, rank, node)
                self._bundles[member.name], self.nodes[member.name] = number, node.node_id
                members.append(member)
        return tuple(members)

    def find(self) -> None:
        """Find the placement groups that an earlier controller has created."""
        self._group = ray.util.get_placement_group(workers_group(self.namespace))
        self._added = ray_tools.added_placement_groups(self.namespace)

    def add(self, place: str, role: Role, workers: WorkersSection) -> WorkerShare:
        """Reserve resources for a worker place that scaling adds; return the worker's resources.

        If no resources are free, Ray reserves them when they become free. Equal CPU shares (the
        default) leave no CPU free on the initial nodes: a worker then reserves no CPU, unless the
        cluster follows its nodes, in which case the worker waits for a further node.
        """
        share = resolved_share(workers)
        group = self._added.get(place)
        if group is None:
            group = self._added[place] = self._added_group(place, role, share)
        elif not (cpus := float(group.bundle_specs[0].get("CPU", 0.0))):
            return replace(share, cpus=cpus)
        may_share = workers.has_equal_cpus and not (share.gpus or workers.follow_nodes)
        if may_share and not group.wait(_FREE_SHARE_S):
            remove_placement_group(group)
            del self._added[place]
            share = replace(share, cpus=0.0)
            self._added[place] = self._added_group(place, role, share)
        return share

    def release(self, places: Collection[str]) -> None:
        """Release the resources of all places in ``places`` that scaling has added."""
        for place in places:
            if place in self._added:
                remove_placement_group(self._added[place])
                del self._added[place]

    def added_places(self) -> set[str]:
        return set(self._added)

    def bundle_for(self, name: str, role: Role, taken: Collection[int]) -> int:
        """Return the index of the placement group bundle in which a worker is to run.

        This is the worker's own bundle, or else a bundle of its role that is not in ``taken``.
        ``ANY_BUNDLE`` means that Ray may choose: roles do not matter, no such bundle exists, or a
        restart of the controller has lost the bundles.
        """
        free = [b for b, r in enumerate(self._roles) if r == role and b not in taken]
        return self._bundles.get(name, free[0] if free else ANY_BUNDLE)

    def strategy(self, place: str, bundle: int) -> PlacementGroupSchedulingStrategy:
        """Return Ray's scheduling strategy for the actor of a worker.

        An added ``place`` has its own placement group; other workers use ``bundle`` of the common
        group.
        """
        group = self._added.get(place, self._group)
        assert group is not None, "resources are reserved before a worker starts"
        return PlacementGroupSchedulingStrategy(
            placement_group=group,
            placement_group_bundle_index=bundle,
            placement_group_capture_child_tasks=False,
        )

    def _added_group(self, place: str, role: Role, share: WorkerShare) -> PlacementGroup:
        selector = selector_for(role, [node.labels for node in ray_tools.cluster_nodes()])
        group: PlacementGroup = placement_group(
            [_bundle(share)],
            name=ray_tools.name_of_added(place, self.namespace),
            lifetime="detached",
            bundle_label_selector=[selector] if selector else None,
        )
        return group


def _bundle(share: WorkerShare) -> dict[str, float]:
    wanted = {"CPU": share.cpus, "GPU": share.gpus}
    return {kind: amount for kind, amount in wanted.items() if amount > 0} or {"memory": 1.0}


def _member(role: Role, rank: int, node: NodeResources) -> Member:
    return Member(
        name=place_name(role, rank),
        role=role,
        rank=rank,
        device=rank if holds_experts(role) else -1,
        node=node.address,
        domain=node.labels.domain,
        link_class=node.labels.link_class,
        speed=node.labels.speed,
    )


def _no_room_text(count: int, share: WorkerShare, limit_s: float) -> str:
    free = ray_tools.free_resources()
    return (
        f"no room for {count} workers of {share.cpus:g} CPUs and {share.gpus:g} GPUs each within "
        f"{limit_s:g} s: free are {free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs"
    )
