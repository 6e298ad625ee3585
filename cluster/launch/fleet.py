"""The fleet of one served model: its controller, which starts and watches the workers."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.actors.controller_client import create_controller
from cluster.core.errors import ExpertMeshError, StartError
from cluster.core.fleets import CONTROLLER_NAME
from cluster.core.states import is_gone
from cluster.launch.model_plan import ModelPlan

logger = logging.getLogger(__name__)

_SNAPSHOT_WAIT_S = 1.0
CALL_LIMIT_S = 5.0
"""Time limit in seconds for a reply of a controller or a gateway."""
AWAY_LIMIT_S = 60.0
"""Seconds for which an actor may not reply, as Ray may be restarting it."""
_DEAD_LIMIT_S = 5.0


@dataclass(slots=True)
class Fleet:
    """The controller and the workers of one model, which a launcher starts or watches."""

    namespace: str
    """Ray namespace of the fleet."""
    compute_threads: str = ""
    """Text about the workers' compute threads; set by ``start``."""
    _controller: Any = None
    _heard_at: float = field(default_factory=time.monotonic)

    def start(
        self,
        model: ModelPlan,
        on_progress: Callable[[int, int], None],
        *,
        asked: Mapping[str, str],
        limit_s: float,
        selector: Mapping[str, str] | None = None,
        free_cpus: float | None = None,
        is_running: bool = False,
    ) -> None:
        """Create the controller with its workers, and return when they serve.

        Args:
            model: plan of the model.
            on_progress: called with the bytes of weights that the workers have loaded, and with the
                number of all.
            asked: the user's options by flag.
            limit_s: time limit in seconds.
            selector: labels of the nodes on which the controller may run.
            free_cpus: see ``ControllerActor.start``.
            is_running: whether the fleet may be running already, and then degraded.

        Raises ``StartError`` with the failing part's own message.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        from cluster.actors.ray_tools import error_summary
        from cluster.actors.worker_group import WorkerGroup
        from workers.process.worker.actor import ACTOR_CLASSES

        group = WorkerGroup(ACTOR_CLASSES, namespace=self.namespace)
        self._controller = create_controller(group, selector=selector)
        call = self._controller.start.remote(
            model.config.to_dict(),
            list(model.facts.banks),
            model.profile,
            dict(asked),
            free_cpus,
        )
        try:
            ray.get(call, timeout=limit_s)
            self._wait_serving(is_running, limit_s, on_progress)
        except RayError as err:
            cause = err.cause if isinstance(err, RayTaskError) else None
            if isinstance(cause, ExpertMeshError):
                raise cause from None
            raise StartError("controller", error_summary(err)) from err
        self._heard_at = time.monotonic()

    def _wait_serving(
        self, is_running: bool, limit_s: float, on_progress: Callable[[int, int], None]
    ) -> None:
        import ray

        version = -1
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            call = self._controller.wait_snapshot.remote(version, _SNAPSHOT_WAIT_S)
            snapshot = ray.get(call, timeout=_SNAPSHOT_WAIT_S + CALL_LIMIT_S)
            version = int(snapshot["version"])
            if snapshot["state"] == "STOPPED":
                raise StartError("cluster", str(snapshot["error"] or "stopped while starting"))
            if snapshot["state"] == "SERVING" or (
                is_running and snapshot["state"] in ("DEGRADED", "RECOVERING")
            ):
                self.compute_threads = describe_threads(snapshot["workers"])
                return
            workers = [w for w in snapshot["workers"] if not is_gone(w["state"])]
            on_progress(
                sum(int(w.get("loaded_bytes") or 0) for w in workers),
                sum(int(w.get("total_bytes") or 0) for w in workers),
            )
        raise StartError("cluster", f"not serving after {limit_s:g} s")

    def find_loss(self) -> str | None:
        """Return the reason why the model cannot be served any more; None while it can.

        A killed controller is no reason: Ray restarts the controller in seconds, while the workers
        keep serving.
        """
        import ray
        from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

        limit_s = AWAY_LIMIT_S
        try:
            if self._controller is None:
                self._controller = ray.get_actor(CONTROLLER_NAME, namespace=self.namespace)
            snapshot = ray.get(self._controller.snapshot.remote(), timeout=CALL_LIMIT_S)
            self._heard_at = time.monotonic()
            return str(snapshot["error"]) if snapshot["state"] == "STOPPED" else None
        except (ValueError, RayError, GetTimeoutError) as err:
            logger.warning("the controller does not answer: %s", err)
            if isinstance(err, ValueError | ActorDiedError):
                limit_s = _DEAD_LIMIT_S  # Ray does not restart it
        lost = time.monotonic() - self._heard_at > limit_s
        return "the controller is lost, see the log" if lost else None


def describe_threads(workers: Iterable[Mapping[str, Any]]) -> str:
    """Describe in a text how many compute threads the ``workers`` have.

    2, 1 and 1 threads -> "1 worker with 2 compute threads, 2 workers with 1 compute thread each"

    ``workers`` are dicts with ``threads`` and ``state``. Workers that have not loaded or have ended
    are left out.
    """
    counts = Counter(
        worker["threads"]
        for worker in workers
        if worker["threads"] is not None and not is_gone(worker["state"])
    )
    return ", ".join(
        f"{workers} worker{'s' * (workers > 1)} with {number} compute thread{'s' * (number > 1)}"
        f"{' each' * (workers > 1)}"
        for number, workers in sorted(counts.items(), reverse=True)
    )
