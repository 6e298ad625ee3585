"""Creates the controller actor in Ray, or finds the one there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from cluster.controller_actor import STATUS_LIMIT_S, ControllerActor
from cluster.controller_settings import ControllerSettings
from cluster.ray_tools import HEAD_NODE, NAMESPACE
from cluster.worker_group_like import WorkerGroupLike

CONTROLLER_NAME = "expertmesh-controller"
"""Name of the actor in our namespace."""
_HEAD_SHARE = 0.001


def create_controller(
    group: WorkerGroupLike,
    settings: ControllerSettings | None = None,
    status_limit_s: float = STATUS_LIMIT_S,
    selector: Mapping[str, str] | None = None,
) -> Any:
    """Create the detached controller actor, or find the one there is; returns its handle.

    ``selector`` are labels of the nodes that it may run on; without it that is where Ray's own head
    is, which must live anyway.
    """
    actor: Any = ray.remote(ControllerActor)
    where: dict[str, Any] = {"resources": {HEAD_NODE: _HEAD_SHARE}}
    if selector:
        where = {"label_selector": dict(selector)}
    return actor.options(
        name=CONTROLLER_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        **where,
    ).remote(group, settings, status_limit_s)
