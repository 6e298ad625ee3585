"""End our app and actors in a Ray that is not ours: ``python -m cluster.end_joined ADDRESS``.

For ``down``, where no launcher owns them, or the one that did is gone. Nothing else in that Ray is
touched. Exits with 3 when nobody answers at the address.
"""

from __future__ import annotations

import contextlib
import sys

from cluster.cluster_calls import ask_controller
from cluster.errors import ExpertMeshError
from cluster.local_ray import join

UNREACHABLE = 3
_STOP_LIMIT_S = 20.0


def end_joined(address: str) -> list[str]:
    """End them by name; the names of the actors that were found.

    Raises ``ConnectionError`` when there is no Ray.
    """
    import ray
    from ray import serve

    from cluster.ray_tools import end_leftovers, our_actors
    from gateway.app import APP_NAME

    join(address)
    try:
        with contextlib.suppress(ValueError):
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            serve.delete(APP_NAME)
        names = our_actors()
        with contextlib.suppress(ExpertMeshError):  # what it does not end is killed
            ask_controller("stop", limit_s=_STOP_LIMIT_S)
        end_leftovers()
        return names
    finally:
        ray.shutdown()


if __name__ == "__main__":
    try:
        sys.stdout.write("\n".join(end_joined(sys.argv[1])))
    except ConnectionError as err:
        sys.stderr.write(f"{err}\n")
        sys.exit(UNREACHABLE)
