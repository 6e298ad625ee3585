"""Queries to Ray: nodes, free resources, named actors of this cluster, causes of errors."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import ray
from ray._private.state import state
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cluster.config.resources import NodeResources
from cluster.core.errors import ConfigError
from cluster.core.fleets import NAMESPACE, is_group, is_namespace, workers_group
from cluster.core.node_labels import NodeLabels

logger = logging.getLogger(__name__)

HEAD_NODE = "node:__internal_head__"
"""Name of the Ray resource that only the head node has."""
_TERM = "term-"
_NUM_TRIES = 20
_PAUSE_S = 0.2
_CALL_LIMIT_S = 10.0


def cluster_nodes(*, is_strict: bool = False) -> tuple[NodeResources, ...]:
    """Return the live nodes of the connected Ray cluster, sorted by address.

    A node with an invalid expertmesh label is skipped and logged, or raises ``ConfigError`` if
    ``is_strict``.
    """
    found = cast("list[dict[str, Any]]", ray.nodes())  # type: ignore[no-untyped-call]
    nodes = []
    for entry in found:
        if not entry["Alive"]:
            continue
        try:
            nodes.append(_node_of(entry))
        except ConfigError as err:
            if is_strict:
                raise
            _warn_once(f"a node is not used: {err}")
    return tuple(sorted(nodes, key=lambda n: (n.address, n.node_id)))


def _node_of(entry: Mapping[str, Any]) -> NodeResources:
    address = str(entry["NodeManagerAddress"])
    return NodeResources(
        node_id=str(entry["NodeID"]),
        address=address,
        cpus=float(entry["Resources"].get("CPU", 0.0)),
        gpus=float(entry["Resources"].get("GPU", 0.0)),
        labels=NodeLabels.of(entry.get("Labels") or {}, address),
    )


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def draining_nodes() -> frozenset[str]:
    """Return the ids of nodes that Ray drains, for example after SIGTERM to their ``ray start``.

    Blocks on a remote call; use a thread.
    """
    return frozenset(state.get_draining_nodes())


def free_resources() -> dict[str, float]:
    """Return the free amount of each resource of the Ray cluster, by resource name."""
    return dict(ray.available_resources())  # type: ignore[no-untyped-call]


def node_address() -> str:
    """Return the cluster IP address of this process's node."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def this_node_id() -> str:
    """Return Ray's id of the calling process's node."""
    return str(ray.get_runtime_context().get_node_id())


def this_actor_was_restarted() -> bool:
    """Return whether Ray has restarted the calling actor in another process."""
    context = ray.get_runtime_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray itself uses a deprecated call here
        for _ in range(_NUM_TRIES):
            answer = context.was_current_actor_reconstructed
            if isinstance(answer, bool):
                return answer
            time.sleep(_PAUSE_S)  # Ray's table does not have this actor yet
    return False


def call_this_actor(method: str) -> None:
    """Make Ray call a method of this actor once the actor's constructor has returned.

    Returns immediately; a thread makes the call. While an actor restarts, Ray rejects calls to it,
    so the call is retried.
    """
    actor = ray.get_runtime_context().current_actor

    def call() -> None:
        for _ in range(_NUM_TRIES):
            try:
                ray.get(getattr(actor, method).remote(), timeout=_CALL_LIMIT_S)
                return
            except GetTimeoutError:
                return  # the method runs
            except RayError as err:
                logger.debug("%s is retried: %s", method, type(err).__name__)
                time.sleep(_PAUSE_S)

    threading.Thread(target=call, name=f"call-{method}", daemon=True).start()


def live_actor_names(namespace: str = NAMESPACE) -> list[str]:
    """Return the names of a fleet's live actors."""
    return sorted(name for found, name in live_actors() if found == namespace)


def live_actors() -> list[tuple[str, str]]:
    """Return namespace and name of each live actor of all fleets."""
    entries = ray.util.list_named_actors(all_namespaces=True)
    return sorted((e["namespace"], e["name"]) for e in entries if is_namespace(e["namespace"]))


def with_process(actors: Mapping[str, Any]) -> list[str]:
    """Return the names of the ``actors`` (handle by name) that have a process.

    The constructor may still run, which Ray's actor state does not show. Blocks on a remote call;
    use a thread.
    """
    return [n for n, actor in actors.items() if state.actor_table(actor._actor_id.hex()).get("Pid")]


def claim_term(identity: str, namespace: str = NAMESPACE) -> int:
    """Claim a term for a fleet's controller ``identity``, above all that are claimed already.

    Ray stores the first claimant of each term. Blocks on a remote call; use a thread.
    """
    while True:
        term = newest_term(namespace=namespace) + 1
        if not _internal_kv_put(f"{_TERM}{term}", identity, overwrite=False, namespace=namespace):
            return term


def newest_term(above: int = 0, but: str = "", namespace: str = NAMESPACE) -> int:
    """Return the highest term above ``above`` that a controller other than ``but`` claimed, or 0.

    A claim that timed out may still take effect later. Blocks on a remote call; use a thread.
    """
    keys = _internal_kv_list(_TERM, namespace=namespace)
    for term in sorted((int(key.removeprefix(_TERM.encode())) for key in keys), reverse=True):
        if term <= above:
            break
        owner = _internal_kv_get(f"{_TERM}{term}", namespace=namespace) if but else None
        if owner is None or owner.decode() != but:
            return term
    return 0


def kill_actors(names: Sequence[str], namespace: str = NAMESPACE) -> None:
    """Kill these actors of a fleet; unknown names are ignored."""
    for name in names:
        with contextlib.suppress(ValueError, RayError):
            ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)


def live_placement_groups(namespace: str | None = None) -> list[dict[str, Any]]:
    """Return Ray's entries of the groups that reserve resources for the workers of a fleet.

    Without ``namespace``, the entries of all fleets.
    """
    return [
        entry
        for entry in placement_group_table().values()
        if is_group(entry["name"], namespace) and entry["state"] != "REMOVED"
    ]


def remove_placement_groups(namespace: str = NAMESPACE) -> None:
    """Remove all placement groups and claimed terms of a fleet, also those of earlier runs.

    This also ends the actors in the groups.
    """
    for entry in live_placement_groups(namespace):
        group_id = bytes.fromhex(entry["placement_group_id"])
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group_id)))
    _internal_kv_del(_TERM, del_by_prefix=True, namespace=namespace)


def name_of_added(place: str, namespace: str = NAMESPACE) -> str:
    """Return the placement group's name for a worker place that scaling has added."""
    return f"{workers_group(namespace)}-{place}"


def added_placement_groups(namespace: str = NAMESPACE) -> dict[str, PlacementGroup]:
    """Return the placement groups of worker places that scaling has added, by place.

    Blocks on a remote call; use a thread.
    """
    names = (entry["name"] for entry in live_placement_groups(namespace))
    prefix = name_of_added("", namespace)
    return {
        name.removeprefix(prefix): ray.util.get_placement_group(name)
        for name in names
        if name.startswith(prefix)
    }


def error_summary(error: BaseException) -> str:
    """Return the cause of a Ray error in one line, if possible the error of the worker itself."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if cause is not None and not isinstance(cause, RayError):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    details = [line for line in lines if line.startswith("The actor is dead because")]
    words = (details or lines or [type(error).__name__])[-1]
    return words.partition(" Some common causes include")[0]
