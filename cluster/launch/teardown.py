"""Ends expertmesh's app and actors in a joined Ray: ``python -m cluster.launch.teardown ADDRESS``.

The command ``down`` runs this module if no launcher owns the cluster or the launcher has ended.
Nothing else in the joined Ray changes. Exits with 3 if nothing listens at the address.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable

from cluster.actors.controller_client import ask_controller
from cluster.core.errors import ExpertMeshError
from cluster.core.fleets import CONTROLLER_NAME, MODELS_NAME, NAMESPACE, namespace_of_group
from cluster.launch.local_ray import join_ray

UNREACHABLE = 3
_STOP_LIMIT_S = 20.0


def end_joined(address: str) -> list[str]:
    """End expertmesh's Serve app and actors in the Ray at ``address``; return the actors' names.

    Raises ``ConnectionError`` if there is no Ray.
    """
    import ray
    from ray import serve

    from cluster.actors.ray_tools import live_actors
    from gateway.app import APP_NAME

    join_ray(address)
    try:
        with contextlib.suppress(ValueError):
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            serve.delete(APP_NAME)
        found = live_actors()
        stop_fleets(_STOP_LIMIT_S)
        end_leftovers()
        return [name for _, name in found]
    finally:
        ray.shutdown()


def stop_fleets(limit_s: float, namespaces: Iterable[str] | None = None) -> None:
    """Ask the controllers of these fleets, by default of all, to end their workers.

    Errors are ignored: what remains is killed by ``end_leftovers``.
    """
    from cluster.actors.ray_tools import kill_actors, live_actors

    if namespaces is None:
        kill_actors([MODELS_NAME], NAMESPACE)  # it would start further fleets
        namespaces = [space for space, name in live_actors() if name == CONTROLLER_NAME]

    def stop(namespace: str) -> None:
        with contextlib.suppress(ExpertMeshError):
            ask_controller("stop", limit_s=limit_s, namespace=namespace)

    threads = [threading.Thread(target=stop, args=(one,), daemon=True) for one in namespaces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit_s)


def end_fleet(namespace: str) -> None:
    """End the workers and the controller of a fleet, and free their resources."""
    from cluster.actors.ray_tools import kill_actors, live_actor_names, remove_placement_groups

    stop_fleets(_STOP_LIMIT_S, [namespace])
    names = [name for name in live_actor_names(namespace) if name != MODELS_NAME]
    kill_actors(sorted(names, key=lambda name: name != CONTROLLER_NAME), namespace)
    remove_placement_groups(namespace)


def end_leftovers() -> list[str]:
    """End all actors of all fleets and free their resources; return their names.

    The controller ends first, because it would replace the other actors. Used by ``down`` without a
    controller and to clean up after an earlier run.
    """
    from cluster.actors.ray_tools import (
        kill_actors,
        live_actors,
        live_placement_groups,
        remove_placement_groups,
    )

    found = live_actors()
    order = {MODELS_NAME: 0, CONTROLLER_NAME: 1}  # each would start the others again
    for namespace, name in sorted(found, key=lambda actor: order.get(actor[1], 2)):
        kill_actors([name], namespace)
    groups = (namespace_of_group(entry["name"]) for entry in live_placement_groups())
    for namespace in {NAMESPACE, *groups, *(namespace for namespace, _ in found)}:
        remove_placement_groups(namespace)
    return [name for _, name in found]


if __name__ == "__main__":
    try:
        sys.stdout.write("\n".join(end_joined(sys.argv[1])))
    except ConnectionError as err:
        sys.stderr.write(f"{err}\n")
        sys.exit(UNREACHABLE)
