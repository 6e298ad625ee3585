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
from cluster.core.fleets import CONTROLLER_NAME, NAMESPACE
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
        stop_fleets(dict.fromkeys(namespace for namespace, _ in found), _STOP_LIMIT_S)
        end_leftovers()
        return [name for _, name in found]
    finally:
        ray.shutdown()


def stop_fleets(namespaces: Iterable[str], limit_s: float) -> None:
    """Ask the controllers of these fleets to end their workers, all at a time.

    Errors are ignored: what remains is killed by ``end_leftovers``.
    """

    def stop(namespace: str) -> None:
        with contextlib.suppress(ExpertMeshError):
            ask_controller("stop", limit_s=limit_s, namespace=namespace)

    threads = [threading.Thread(target=stop, args=(one,), daemon=True) for one in namespaces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit_s)


def end_leftovers() -> list[str]:
    """End all actors of all fleets and free their resources; return their names.

    The controller ends first, because it would replace the other actors. Used by ``down`` without a
    controller and to clean up after an earlier run.
    """
    from cluster.actors.ray_tools import kill_actors, live_actors, remove_placement_groups

    found = live_actors()
    for namespace, name in sorted(found, key=lambda actor: actor[1] != CONTROLLER_NAME):
        kill_actors([name], namespace)
    for namespace in {NAMESPACE, *(namespace for namespace, _ in found)}:
        remove_placement_groups(namespace)
    return [name for _, name in found]


if __name__ == "__main__":
    try:
        sys.stdout.write("\n".join(end_joined(sys.argv[1])))
    except ConnectionError as err:
        sys.stderr.write(f"{err}\n")
        sys.exit(UNREACHABLE)
