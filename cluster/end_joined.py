"""End our app and actors in a Ray that is not ours: ``python -m cluster.end_joined ADDRESS``.

For ``down`` when the launcher that started them is gone. Nothing else in that cluster is touched.
"""

from __future__ import annotations

import contextlib
import sys

from cluster.local_ray import join


def end_joined(address: str) -> list[str]:
    """End them by name; the names of the actors that were found."""
    import ray
    from ray import serve

    from cluster.ray_tools import end_leftovers
    from gateway.app import APP_NAME

    join(address)
    try:
        with contextlib.suppress(ValueError):
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            serve.delete(APP_NAME)
        return end_leftovers()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    end_joined(sys.argv[1])
