"""Creates the controller actor in Ray and calls its methods. Imports Ray only inside functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.core.errors import ExpertMeshError, NotReadyError
from cluster.core.fleets import CONTROLLER_NAME, NAMESPACE

if TYPE_CHECKING:
    from cluster.actors.worker_group import WorkerGroup  # imports Ray

_HEAD_SHARE = 0.001
_RETRY_S = 2.0


def create_controller(
    group: WorkerGroup,
    status_limit_s: float | None = None,
    selector: Mapping[str, str] | None = None,
) -> Any:
    """Create the detached controller actor of ``group``, or find it; returns its handle.

    ``selector``: labels of the nodes on which the actor may run. By default, the actor runs on the
    Ray head node, without which the cluster cannot run anyway.
    """
    import ray

    from cluster.actors.controller_actor import STATUS_LIMIT_S, ControllerActor
    from cluster.actors.ray_tools import HEAD_NODE

    actor: Any = ray.remote(ControllerActor)
    where: dict[str, Any] = {"resources": {HEAD_NODE: _HEAD_SHARE}}
    if selector:
        where = {"label_selector": dict(selector)}
    limit_s = STATUS_LIMIT_S if status_limit_s is None else status_limit_s
    return actor.options(
        name=CONTROLLER_NAME,
        namespace=group.namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        **where,
    ).remote(group, limit_s, has_process=True)


def ask_controller(method: str, *arguments: Any, limit_s: float, namespace: str = NAMESPACE) -> Any:
    """Call a method of a fleet's ``ControllerActor`` and return its result.

    Raises the errors of the method, and ``NotReadyError`` if there is no controller or no reply
    within ``limit_s`` seconds.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    from cluster.actors.ray_tools import error_summary

    try:
        actor: Any = ray.get_actor(CONTROLLER_NAME, namespace=namespace)
        return ray.get(getattr(actor, method).remote(*arguments), timeout=limit_s)
    except ValueError as err:
        raise NotReadyError("no cluster runs there", "not_ready", _RETRY_S) from err
    except (RayError, GetTimeoutError) as err:
        if isinstance(err, RayTaskError) and isinstance(err.cause, ExpertMeshError):
            raise err.cause from None
        text = f"the controller does not answer: {error_summary(err)}"
        raise NotReadyError(text, "not_ready", _RETRY_S) from err
