"""CPU and GPU accounting: what each worker gets of the cluster's resources. Plain values.

Ray's CPUs only decide where a worker fits; ``WorkerShare.threads`` decides what it computes with.

Example, one node of 2 CPUs: of 3 workers each reserves 0.6666 CPUs and computes with one thread;
one worker alone reserves 2 CPUs and computes with two threads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.config.workers import WorkersSection
from cluster.core.checks import check
from cluster.core.errors import ConfigError
from cluster.core.node_labels import NodeLabels

_GRAIN = 10_000
"""Ray counts resources in ten-thousandths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeResources:
    """What one live node of the Ray cluster has."""

    node_id: str
    """Ray's id."""
    address: str
    """IP address, for people and for ordering."""
    cpus: float
    """CPUs in Ray's accounting."""
    gpus: float = 0.0
    """GPUs in Ray's accounting."""
    place: NodeLabels = field(default_factory=NodeLabels)
    """What its labels say."""


def ids_by_address(nodes: Sequence[NodeResources]) -> dict[str, frozenset[str]]:
    """Ids of the nodes at each address; a host that came back may be two nodes for a while."""
    addresses = {n.address for n in nodes}
    return {a: frozenset(n.node_id for n in nodes if n.address == a) for a in addresses}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerShare:
    """What Ray sets aside for each worker."""

    cpus: float
    """CPUs, may be a fraction; 0 only where the cluster has none to give."""
    gpus: float
    """GPUs, may be a fraction."""
    device: Literal["cpu", "cuda"]
    """What the workers compute on."""
    threads: int = 1
    """Compute threads of one worker, at least one: all its whole cores. The gateway, the controller
    and Ray have no core of their own, as their work is small."""


def resolved_share(workers: WorkersSection) -> WorkerShare:
    """The share in a configuration that workers were started with: nothing is ``auto`` there."""
    return WorkerShare(
        cpus=workers.cpus_per_worker or 0.0,
        gpus=workers.gpus_per_worker or 0.0,
        device="cuda" if workers.device == "cuda" else "cpu",
        threads=workers.threads_per_worker,
    )


def num_fitting_workers(node: NodeResources, share: WorkerShare) -> int:
    """Workers of this share that fit on the node while nothing runs there; without a share, one."""
    wanted = ((share.gpus, node.gpus), (share.cpus, node.cpus))
    return min((_room([amount], each) for each, amount in wanted if each > 0), default=1)


def nodes_for(role: str, nodes: Sequence[NodeResources]) -> tuple[NodeResources, ...]:
    """Nodes that a role may run on: those labelled for it, else those that are labelled for none.

    Equal to the selector of ``node_labels.selector_for``.
    """
    mine = tuple(n for n in nodes if n.place.role == role)
    return mine or tuple(n for n in nodes if not n.place.role)


_Pools = Mapping[tuple[NodeResources, ...], int]
"""Nodes -> workers that share them. Two pools have no node in common."""


def _pools(workers: WorkersSection, nodes: Sequence[NodeResources]) -> _Pools:
    """Roles that run on the same nodes are one pool."""
    counts: Counter[tuple[NodeResources, ...]] = Counter()
    for role, number in workers.pools.items():
        counts[nodes_for(role, nodes)] += number
    return counts


def plan_shares(
    workers: WorkersSection, nodes: Sequence[NodeResources], free_cpus: float | None = None
) -> WorkerShare:
    """Each worker's share; defaults are made to fit, explicit values are checked.

    ``free_cpus`` is what other users of a joined cluster leave, read before anything of ours runs
    there; None when all is ours. Raises ``ConfigError`` naming field, value and the available
    amount.
    """
    pools = _pools(workers, nodes)
    gpus = _gpu_share(workers, pools)
    if workers.cpus_per_worker is not None:
        cpus = cores = workers.cpus_per_worker
        _check_fit("cpus", cpus, pools)
    else:
        cpus = cores = min(_largest_share([n.cpus for n in p], count) for p, count in pools.items())
        total = sum(n.cpus for n in nodes)
        if free_cpus is not None and 0 <= free_cpus < total:
            cpus = _round_down(cpus * free_cpus / total)
            # others that reserve less than half a core in all, as coordinators do, rarely compute
            cores = _round_down(cores * round(free_cpus) / total)
    return WorkerShare(
        cpus=cpus,
        gpus=gpus,
        device="cuda" if gpus > 0 else "cpu",
        threads=max(1, math.floor(cores)),
    )


def _gpu_share(workers: WorkersSection, pools: _Pools) -> float:
    """GPUs of one worker: explicit, or a whole one where there are enough, or a fraction."""
    asked = workers.gpus_per_worker
    if workers.device == "cpu":
        if asked:
            raise ConfigError("gpus_per_worker", asked, "must be 0 with device cpu")
        return 0.0
    if asked is not None:
        if workers.device == "cuda" and asked == 0:
            raise ConfigError("gpus_per_worker", asked, "must be above 0 with device cuda")
        _check_fit("gpus", asked, pools)
        return asked
    largest = [_largest_share([n.gpus for n in p], count) for p, count in pools.items()]
    share = min(1.0, *largest)
    if workers.device == "auto":
        # NCCL refuses two ranks on one GPU, so a fraction is taken only when it is asked for.
        return 1.0 if share == 1.0 else 0.0
    if share == 0:
        raise ConfigError("device", "cuda", "needs GPUs in the Ray cluster, it has none")
    return share


def _check_fit(kind: Literal["cpus", "gpus"], value: float, pools: _Pools) -> None:
    """Refuse a value of which a pool's workers do not fit on its nodes (each is on one node)."""
    for nodes, count in pools.items():
        amounts = [float(getattr(n, kind)) for n in nodes]
        there = ", ".join(f"{n.address}: {a:g}" for n, a in zip(nodes, amounts, strict=True))
        check(
            value <= 0 or _room(amounts, value) >= count,
            f"{kind}_per_worker",
            f"{value:g}",
            f"does not fit: {count} workers ask for {value * count:g} {kind[:-1].upper()}s, "
            f"the cluster has {sum(amounts):g} ({there or 'no node'})",
        )


def _largest_share(amounts: Sequence[float], num_workers: int) -> float:
    """Largest equal share of which ``num_workers`` fit when each lies on one node.

    Some node is used up exactly, so the answer is an amount divided by a whole number.
    """
    candidates = {
        _round_down(amount / parts) for amount in amounts for parts in range(1, num_workers + 1)
    }
    return max((c for c in candidates if c > 0 and _room(amounts, c) >= num_workers), default=0.0)


def _room(amounts: Sequence[float], share: float) -> int:
    """Workers of ``share`` that fit on nodes of these amounts."""
    grains = max(1, round(share * _GRAIN))
    return sum(round(amount * _GRAIN) // grains for amount in amounts)


def _round_down(value: float) -> float:
    return math.floor(value * _GRAIN + 1e-6) / _GRAIN
