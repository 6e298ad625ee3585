"""Calls one worker actor, converts Ray's errors, and ends the actor's process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import ray_tools
from cluster.actors.resource_reservation import ANY_BUNDLE
from cluster.core.errors import NotReadyError, StartError, SupersededError
from cluster.core.process import ProcessIdentity, describe_self, kill_process, wait_gone

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
CALL_LIMIT_S = 5.0
"""Longest wait for a reply of Ray or of a worker, in seconds."""


@dataclass(slots=True)
class ActorCalls:
    """Calls one worker actor and converts Ray's errors. Owned by ``WorkerGroup``."""

    name: str
    handle: Any
    node_id: str
    """Ray's id of the worker's node; empty while unknown."""
    bundle: int = ANY_BUNDLE
    """Index of the placement group bundle in which the worker runs; ``ANY_BUNDLE`` if unknown."""
    process: ProcessIdentity | None = None
    """Process of the worker; None before ``introduce``."""

    async def introduce(self) -> dict[str, Any]:
        """Record the worker's process and node; return the result of its ``describe()``.

        Raises Ray's errors.
        """
        call: Any = self.handle.__ray_call__.remote
        arguments: dict[str, Any]
        arguments, self.process, self.node_id = await call(_describe_worker)
        return arguments

    async def start(self) -> None:
        """Call the actor's ``start``. Raises ``StartError`` with the worker's error text."""
        try:
            await self.introduce()
            await self.handle.start.remote()
        except RayError as err:
            raise StartError(self.name, ray_tools.error_summary(err)) from err

    async def log(self, after: int) -> tuple[int, list[str]]:
        """Return the number of all log lines, and the newest lines; see ``WorkerGroup.log``."""
        try:
            call = self.handle.log.remote(after)
            found: tuple[int, list[str]] = await asyncio.wait_for(call, CALL_LIMIT_S)
        except (RayError, TimeoutError) as err:
            raise NotReadyError(f"{self.name} does not answer", "not_ready", 1.0) from err
        return found

    async def redirect(self, control_address: str, term: int, identity: str) -> None:
        """Send the worker the address of this controller.

        Raises ``SupersededError``, ``ProcessLookupError`` if the worker has died, and Ray's errors.
        """
        call = self.handle.redirect.remote(control_address, term, identity)
        try:
            await asyncio.wait_for(call, CALL_LIMIT_S)
        except ActorUnavailableError:
            raise
        except RayActorError as err:
            raise ProcessLookupError(ray_tools.error_summary(err)) from err
        except RayTaskError as err:
            _raise_superseded(err)
            raise

    async def death(self) -> str | None:
        """Return Ray's reason if the actor is dead; None while it may be alive."""
        try:
            await asyncio.wait_for(self.handle.ping.remote(), CALL_LIMIT_S)
        except ActorUnavailableError:
            return None  # the network may recover; a dead actor raises ActorDiedError
        except (RayActorError, RayTaskError) as err:
            return ray_tools.error_summary(err)  # dead, or its ping raised why it cannot continue
        except (TimeoutError, RayError):
            return None  # busy: covered by the start limit
        return None

    async def stop(self, term: int, identity: str, limit_s: float) -> bool:
        """Call the actor's ``stop``; return whether that succeeded. Raises ``SupersededError``."""
        try:
            await asyncio.wait_for(self.handle.stop.remote(term, identity), limit_s)
        except (RayError, TimeoutError) as err:
            _raise_superseded(err)
            logger.info("%s did not stop on request: %s", self.name, type(err).__name__)
            return False
        return True

    async def kill(self, is_stopped: bool) -> None:
        """Kill the actor through Ray, and its process by process id unless the process has ended.

        ``is_stopped``: whether ``stop`` has succeeded; if not, the process is killed first.
        """
        if not is_stopped:
            await self._kill_process()
        with contextlib.suppress(RayError, ValueError, TimeoutError):
            await in_time(ray.kill, self.handle, no_restart=True)
        if is_stopped and not await self._is_gone():
            await self._kill_process()

    async def _is_gone(self) -> bool:
        """Return whether a stopped worker's process has ended; True if it cannot be checked."""
        if self.process is None or self.node_id != ray_tools.this_node_id():
            return True
        return await asyncio.to_thread(wait_gone, self.process, 1.0)

    async def _kill_process(self) -> None:
        """Send SIGKILL to the worker's process, because Ray itself ends it seconds later."""
        if self.process is None:
            return
        if self.node_id == ray_tools.this_node_id():
            kill_process(self.process)
            await asyncio.to_thread(wait_gone, self.process, 1.0)
            return
        where = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        task = ray.remote(kill_process).options(num_cpus=0, scheduling_strategy=where)
        with contextlib.suppress(RayError, TimeoutError):
            killing = await in_time(task.remote, self.process)  # exports the function to Ray's head
            await asyncio.wait_for(killing, CALL_LIMIT_S)


async def in_time(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking call of Ray in a thread. Raises ``TimeoutError`` after ``CALL_LIMIT_S``."""
    return await asyncio.wait_for(asyncio.to_thread(call, *args, **kwargs), CALL_LIMIT_S)


def _describe_worker(actor: Any) -> tuple[dict[str, Any], ProcessIdentity, str]:
    """Return the worker's ``describe()``, process and Ray node id. Runs in the worker's process."""
    return actor.describe(), describe_self(), ray_tools.this_node_id()


def _raise_superseded(err: Exception) -> None:
    """Raise the ``SupersededError`` that caused the Ray error ``err``; otherwise return."""
    if isinstance(err, RayTaskError) and isinstance(err.cause, SupersededError):
        raise err.cause from err
