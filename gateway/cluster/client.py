"""The gateway's only calls through Ray: to the controller's actor and to other gateway replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayTaskError

from cluster.core.codec import from_plain
from cluster.core.errors import ExpertMeshError
from cluster.core.fleets import CONTROLLER_NAME, MODELS_NAME, NAMESPACE
from cluster.core.model_table import ModelTable
from gateway.cluster.serve_replicas import ReplicaCall, ReplicaHandlers, own_first

logger = logging.getLogger(__name__)

REPLICA_LIMIT_S = 1.0
"""Time limit in seconds for the replies of the other gateway replicas."""
_TABLE_LIMIT_S = 30.0
_TABLE_CALL_S = 5.0
_TABLE_RETRY_S = 0.5


class RayActor:
    """Calls an actor through its Ray handle; implements ``ControllerCalls`` and ``TableCalls``."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def call(self, call: str, *details: Any, **named: Any) -> Any:
        """Call a method of the actor and return its result.

        Raises the method's expertmesh errors without Ray's wrapper, and other errors as Ray does.
        """
        try:
            return await getattr(self._handle, call).remote(*details, **named)
        except RayTaskError as err:
            if isinstance(err.cause, ExpertMeshError):
                raise err.cause from None
            raise


async def find_controller(namespace: str = NAMESPACE) -> RayActor:
    """Find the controller's actor of a fleet. Raises ``ValueError`` if there is none."""
    return RayActor(await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, namespace=namespace))


async def find_models_actor() -> RayActor:
    """Find the actor that keeps the table of models. Raises ``ValueError`` if there is none."""
    return RayActor(await asyncio.to_thread(ray.get_actor, MODELS_NAME, namespace=NAMESPACE))


async def read_table() -> ModelTable | None:
    """Return the table of models; None while the cluster starts, or if it cannot be read in time.

    Ray restarts a killed actor in seconds.
    """
    end_s = time.monotonic() + _TABLE_LIMIT_S
    while True:
        try:
            actor = await find_models_actor()
            found = await asyncio.wait_for(actor.call("table"), _TABLE_CALL_S)
            return from_plain(found, ModelTable)
        except ValueError:  # there is no such actor yet
            return None
        except Exception as err:  # Ray restarts the actor
            if time.monotonic() > end_s:
                logger.warning("the table of models cannot be read: %r", err)
                return None
            await asyncio.sleep(_TABLE_RETRY_S)


class RayServeReplicas:
    """Calls all gateway replicas through a Ray Serve handle; implements ``ServeReplicas``.

    Must be made in a Serve replica.
    """

    def __init__(self, answers: ReplicaHandlers) -> None:
        self._answers = answers
        context = serve.get_replica_context()
        self._handle: Any = serve.get_deployment_handle(context.deployment, context.app_name)

    async def call(self, call: ReplicaCall, *details: Any) -> dict[str, Any]:
        own = self._answers.handle(call, *details)
        try:
            found = await asyncio.to_thread(self._broadcast, call, details)
        except Exception as err:  # any failure of Serve; this replica's reply is still returned
            logger.warning("could not call the other replicas: %r", err)
            found = []
        for failed in (one for one in found if isinstance(one, BaseException)):
            logger.warning("a replica did not reply: %r", failed)
        answered = dict(one for one in found if not isinstance(one, BaseException))
        return own_first(own, answered)

    def _broadcast(self, call: ReplicaCall, details: tuple[Any, ...]) -> list[Any]:
        response = self._handle.broadcast("answer_replica", call, *details)
        return list(response.results(timeout_s=REPLICA_LIMIT_S, return_exceptions=True))
