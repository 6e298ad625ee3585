"""Calls to the controller of a cluster in the Ray that this process is connected to."""

from __future__ import annotations

from typing import Any

from cluster.errors import ExpertMeshError, NotReadyError

_RETRY_S = 2.0


def ask_controller(method: str, *arguments: Any, limit_s: float) -> Any:
    """The answer of a method of ``ControllerActor``.

    Raises its own errors, and ``NotReadyError`` where there is no controller or no answer.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    from cluster.controller_handle import CONTROLLER_NAME
    from cluster.ray_tools import NAMESPACE, words_of

    try:
        actor: Any = ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
        return ray.get(getattr(actor, method).remote(*arguments), timeout=limit_s)
    except ValueError as err:
        raise NotReadyError("no cluster runs there", "not_ready", _RETRY_S) from err
    except (RayError, GetTimeoutError) as err:
        if isinstance(err, RayTaskError) and isinstance(err.cause, ExpertMeshError):
            raise err.cause from None
        text = f"the controller does not answer: {words_of(err)}"
        raise NotReadyError(text, "not_ready", _RETRY_S) from err
