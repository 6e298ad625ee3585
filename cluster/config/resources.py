"""Computes each worker's share of the cluster's CPUs and GPUs. Plain values.

Ray uses the reserved CPUs only to decide where a worker fits; ``WorkerShare.threads`` is the
worker's number of compute threads.

Example: on one node of 2 CPUs, 3 workers each reserve 0.6666 CPUs and compute with one thread; one
worker alone reserves 2 CPUs and computes with two threads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.config.workers import WorkersSection
from cluster.core.checks import check
from cluster.core.errors import ConfigError
from cluster.core.node_labels import NodeLabels

_GRAIN = 10_000
"""Number of units in one CPU or GPU: Ray counts resources in 1/10,000."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeResources:
    """Resources of one live node of the Ray cluster."""

    node_id: str
    """Ray's node id."""
    address: str
    """IP address, for messages and as sort order."""
    cpus: float
    """Number of CPUs that Ray counts."""
    gpus: float = 0.0
    """Number of GPUs that Ray counts."""
    labels: NodeLabels = field(default_factory=NodeLabels)
    """The expertmesh labels of the node."""


def ids_by_address(nodes: Sequence[NodeResources]) -> dict[str, frozenset[str]]:
    """Return the ids of the nodes at each address; a host that rejoins may briefly be two nodes."""
    addresses = {n.address for n in nodes}
    return {a: frozenset(n.node_id for n in nodes if n.address == a) for a in addresses}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerShare:
    """Resources that Ray reserves for each worker."""

    cpus: float
    """Number of CPUs of a worker, may be a fraction; 0 only if the cluster has none left."""
    gpus: float
    """Number of GPUs of a worker, may be a fraction."""
    device: Literal["cpu", "cuda"]
    """Device on which the workers compute."""
    threads: int = 1
    """Number of compute threads of one worker: the whole cores of its CPU share, at least one. No
    cores are reserved for the gateway, the controller and Ray, since their load is small.
    """


def resolved_share(workers: WorkersSection) -> WorkerShare:
    """Return the share in the configuration of a started cluster, in which no value is ``auto``."""
    return WorkerShare(
        cpus=workers.cpus_per_worker or 0.0,
        gpus=workers.gpus_per_worker or 0.0,
        device="cuda" if workers.device == "cuda" else "cpu",
        threads=workers.threads_per_worker,
    )


def num_fitting_workers(node: NodeResources, share: WorkerShare) -> int:
    """Return how many workers with this share fit on the empty node; 1 if the share is zero."""
    wanted = ((share.gpus, node.gpus), (share.cpus, node.cpus))
    return min(
        (_num_fitting_shares([amount], each) for each, amount in wanted if each > 0), default=1
    )


def nodes_for(role: str, nodes: Sequence[NodeResources]) -> tuple[NodeResources, ...]:
    """Return the nodes labelled for a role, or if there are none, the nodes without a role label.

    Equivalent to the selector of ``node_labels.selector_for``.
    """
    mine = tuple(n for n in nodes if n.labels.role == role)
    return mine or tuple(n for n in nodes if not n.labels.role)


_Pools = Mapping[tuple[NodeResources, ...], int]
"""Number of workers by the nodes on which they run. Two pools have no node in common."""


def _pools(sizes: Iterable[tuple[str, int]], nodes: Sequence[NodeResources]) -> _Pools:
    """Return the pools of roles with these sizes: roles on the same nodes form one pool."""
    counts: Counter[tuple[NodeResources, ...]] = Counter()
    for role, number in sizes:
        counts[nodes_for(role, nodes)] += number
    return counts


def plan_shares(
    workers: WorkersSection, nodes: Sequence[NodeResources], free_cpus: float | None = None
) -> WorkerShare:
    """Compute each worker's share: fit the defaults to the nodes, and check explicit values.

    ``free_cpus``: CPUs that other users of a joined cluster leave, read before expertmesh starts
    anything there; None if all CPUs are available. Raises ``ConfigError`` with field, value and the
    available amount.
    """
    own = _pools(workers.pools.items(), nodes)
    pools = _pools((*workers.pools.items(), *workers.other_pools), nodes)
    gpus = _gpu_share(workers, own, pools)
    if workers.cpus_per_worker is not None:
        cpus = cores = workers.cpus_per_worker
        _check_fit("cpus", cpus, own)
    else:
        cpus = cores = min(_largest_share([n.cpus for n in p], count) for p, count in pools.items())
        total = sum(n.cpus for n in nodes)
        if free_cpus is not None and 0 <= free_cpus < total:
            cpus = _round_down(cpus * free_cpus / total)
            # other users that reserve under half a core in all, as coordinators do, rarely compute
            cores = _round_down(cores * round(free_cpus) / total)
        cpus = cpus if workers.reserves_cpus else 0.0
    return WorkerShare(
        cpus=cpus,
        gpus=gpus,
        device="cuda" if gpus > 0 else "cpu",
        threads=max(1, math.floor(cores)),
    )


def _gpu_share(workers: WorkersSection, own: _Pools, pools: _Pools) -> float:
    """Return the GPUs of one worker: the given value, else 1, or a share if GPUs are too few.

    With device ``auto``, 0 replaces the share; ``cpu`` means 0. Raises ``ConfigError``.
    """
    asked = workers.gpus_per_worker
    if workers.device == "cpu":
        if asked:
            raise ConfigError("gpus_per_worker", asked, "must be 0 with device cpu")
        return 0.0
    if asked is not None:
        if workers.device == "cuda" and asked == 0:
            raise ConfigError("gpus_per_worker", asked, "must be above 0 with device cuda")
        _check_fit("gpus", asked, own)
        return asked
    largest = [_largest_share([n.gpus for n in p], count) for p, count in pools.items()]
    share = min(1.0, *largest)
    if workers.device == "auto":
        # NCCL rejects two ranks on one GPU, so a fraction needs an explicit request.
        return 1.0 if share == 1.0 else 0.0
    if share == 0:
        raise ConfigError("device", "cuda", "needs GPUs, but the Ray cluster has none")
    return share


def _check_fit(kind: Literal["cpus", "gpus"], value: float, pools: _Pools) -> None:
    """Raise ``ConfigError`` if a pool's workers, each on one node, do not fit on its nodes."""
    for nodes, count in pools.items():
        amounts = [float(getattr(n, kind)) for n in nodes]
        there = ", ".join(f"{n.address}: {a:g}" for n, a in zip(nodes, amounts, strict=True))
        check(
            value <= 0 or _num_fitting_shares(amounts, value) >= count,
            f"{kind}_per_worker",
            f"{value:g}",
            f"does not fit: {count} workers need {value * count:g} {kind[:-1].upper()}s, "
            f"the cluster has {sum(amounts):g} ({there or 'no node'})",
        )


def _largest_share(amounts: Sequence[float], num_workers: int) -> float:
    """Return the largest share with which ``num_workers`` workers fit, each on one node.

    The result is some node's amount divided by an integer, because else a larger share would fit
    too.
    """
    candidates = {
        _round_down(amount / parts) for amount in amounts for parts in range(1, num_workers + 1)
    }
    return max(
        (c for c in candidates if c > 0 and _num_fitting_shares(amounts, c) >= num_workers),
        default=0.0,
    )


def _num_fitting_shares(amounts: Sequence[float], share: float) -> int:
    """Return how many workers with this share fit on nodes with these amounts."""
    grains = max(1, round(share * _GRAIN))
    return sum(round(amount * _GRAIN) // grains for amount in amounts)


def _round_down(value: float) -> float:
    return math.floor(value * _GRAIN + 1e-6) / _GRAIN
