"""Ends expertmesh's app and actors in a joined Ray: ``python -m cluster.launch.teardown ADDRESS``.

The command ``down`` runs this module if no launcher owns the cluster or the launcher has ended.
Nothing else in the joined Ray changes. Exits with 3 if nothing listens at the address.
"""

from __future__ import annotations

import contextlib
import sys

from cluster.actors.controller_client import ask_controller
from cluster.core.errors import ExpertMeshError
from cluster.launch.local_ray import join_ray

UNREACHABLE = 3
_STOP_LIMIT_S = 20.0


def end_joined(address: str) -> list[str]:
    """End expertmesh's Serve app and actors in the Ray at ``address``; return the actors' names.

    Raises ``ConnectionError`` if there is no Ray.
    """
    import ray
    from ray import serve

    from cluster.actors.ray_tools import live_actor_names
    from gateway.app import APP_NAME

    join_ray(address)
    try:
        with contextlib.suppress(ValueError):
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            serve.delete(APP_NAME)
        names = live_actor_names()
        with contextlib.suppress(ExpertMeshError):  # what remains is killed
            ask_controller("stop", limit_s=_STOP_LIMIT_S)
        end_leftovers()
        return names
    finally:
        ray.shutdown()


def end_leftovers() -> list[str]:
    """End all actors of expertmesh's namespace and free their resources; return their names.

    The controller ends first, because it would replace the other actors. Used by ``down`` without a
    controller and to clean up after an earlier run.
    """
    from cluster.actors.ray_tools import kill_actors, live_actor_names, remove_placement_groups

    names = live_actor_names()
    kill_actors(sorted(names, key=lambda name: not name.startswith("expertmesh-")))
    remove_placement_groups()
    return names


if __name__ == "__main__":
    try:
        sys.stdout.write("\n".join(end_joined(sys.argv[1])))
    except ConnectionError as err:
        sys.stderr.write(f"{err}\n")
        sys.exit(UNREACHABLE)
