"""Computes the placement that a cluster needs before workers can leave it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.controller.cluster import Cluster
from cluster.core.errors import ConflictError
from cluster.planner.stages import Stage
from cluster.policy.coverage import stage_on


def stage_without(names: Sequence[str], cluster: Cluster) -> Stage | None:
    """Return a stage (loads and placement) after which the workers ``names`` hold no experts.

    None if none of these workers holds experts now. Raises ``ConflictError`` if any of them is not
    ready, or if the cluster cannot run without them.
    """
    for name in names:
        record = cluster.workers[name]
        if not record.is_ready:
            raise ConflictError(f"{name} is {record.state.value}")
    members = cluster.generation.members
    if not any(m.runs_attention for m in members if m.name not in names):
        last = [n for n in names if cluster.workers[n].member.runs_attention]
        if not last:
            raise ConflictError("no attention worker is left: nothing runs without it")
        more = 1 + sum(m.runs_attention for m in members)
        first = f"add another one first: expertmesh scale --attention {more}"
        raise ConflictError(f"{last[0]} is the last attention worker: {first}")
    others = {m.device for m in cluster.generation.experts if m.name not in names}
    if len(others) == len(cluster.generation.experts):
        return None
    return stage_on(others, cluster.placement, cluster.room)
