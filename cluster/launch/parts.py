"""Starts and ends the parts of one cluster: Ray, the controller with its workers, the gateway.

The only module that imports the classes of workers, controller and gateway together.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from cluster.actors.controller_client import ask_controller, create_controller
from cluster.config.gateway import ShutdownStage
from cluster.core.errors import ExpertMeshError, StartError
from cluster.core.process import ProcessIdentity
from cluster.core.states import is_gone
from cluster.launch.joining import JoinedRay, inspect_ray, is_deployed
from cluster.launch.local_ray import PrivateRay, join_ray
from cluster.launch.plan import LaunchPlan
from cluster.launch.readiness import wait_ready
from cluster.launch.teardown import end_leftovers
from cluster.tracing import logs

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_SNAPSHOT_WAIT_S = 1.0
_CALL_LIMIT_S = 5.0
_AWAY_LIMIT_S = 60.0
_TELL_LIMIT_S = 1.0
_FAIL_LIMIT_S = 1.0
_DEAD_LIMIT_S = 5.0
_JOIN_PATIENCE_S = 30.0
"""Seconds for a joined Ray to accept connections, since Ray may be starting."""

ProgressFn = Callable[[str, int, int], None]
"""Callback for progress: stage, amount done, total amount (0 if unknown)."""


class ClusterParts:
    """Parts of a cluster that one launcher starts and ends."""

    def __init__(self, plan: LaunchPlan, progress: ProgressFn) -> None:
        self.plan = plan
        """Launch plan; ``start_ray`` adapts the plan to a joined Ray."""
        self.compute_threads = ""
        """Text about the workers' compute threads; set by ``start_services``."""
        self.admin = {"http": "", "grpc": ""}
        """Address ``host:port`` of a gateway's admin port, by protocol; from ``start_services``."""
        self._progress = progress
        self._ray = PrivateRay(folder=Path(plan.temp_dir)) if plan.temp_dir else None
        self._joined = JoinedRay(plan=plan)
        self._controller: Any = None
        self._is_connected = False
        self._has_app = False
        self._heard_at = 0.0

    def start_ray(self) -> str:
        """Start the private Ray or join the given one; return Ray's address. Main thread only.

        Raises ``ConfigError`` if the joined Ray is unsuitable, ``StartError`` if Ray cannot be
        joined.
        """
        self._progress("ray", 0, 0)
        loader = threading.Thread(target=_import_services, daemon=True)
        loader.start()
        if self._ray is not None:
            address = self._ray.start(self.plan.num_cpus, self.plan.num_gpus)
        else:
            address = self._join()
        self._is_connected = True
        loader.join()
        if self._ray is None:
            if self.plan.wait_nodes:
                self._progress("nodes", 0, 0)
            self._joined = inspect_ray(self.plan, address)
            self.plan = self._joined.plan
        return address

    def start_services(self) -> None:
        """Start the controller with workers, and the gateway; return when clients can call.

        Raises ``StartError`` with the failing part's own message.
        """
        self._progress("workers", 0, 0)
        pool = ThreadPoolExecutor(2)
        try:
            _wait_all([pool.submit(self._start_workers), pool.submit(self._start_gateway)])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a stop must not wait for the start
        self._progress("gateway", 0, 0)
        section = self.plan.config.gateway
        wait_ready(self.plan.http_url, section, self._not_ready_reasons)
        if self.plan.serve_proxy_url:
            wait_ready(self.plan.serve_proxy_url, section, self._not_ready_reasons)
        found: dict[str, Any] = self._ask_gateway("addresses")
        self.admin = {kind: found[f"admin_{kind}"] for kind in self.admin}
        self._heard_at = time.monotonic()

    def find_loss(self) -> str | None:
        """Return the reason why the cluster cannot continue; None while the cluster can continue.

        A killed controller is no reason: Ray restarts the controller in seconds, while the workers
        keep serving.
        """
        import ray
        from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

        limit_s = _AWAY_LIMIT_S
        try:
            snapshot = ray.get(self._controller.snapshot.remote(), timeout=_CALL_LIMIT_S)
            self._heard_at = time.monotonic()
            return str(snapshot["error"]) if snapshot["state"] == "STOPPED" else None
        except (RayError, GetTimeoutError) as err:
            logger.warning("the controller does not answer: %s", err)
            if isinstance(err, ActorDiedError):
                limit_s = _DEAD_LIMIT_S  # Ray does not restart it
        lost = time.monotonic() - self._heard_at > limit_s
        return "the controller is lost, see the log" if lost else None

    def processes(self) -> list[ProcessIdentity]:
        """Return the processes of the private Ray on this host; empty for a joined Ray."""
        return self._ray.processes() if self._ray is not None and self._is_connected else []

    def send_shutdown_stage(self, stage: ShutdownStage) -> int:
        """Tell every gateway replica the shutdown stage; return the number of running requests.

        Has no effect, and returns 0, unless this launcher has started the gateway completely.
        """
        if not self._has_app or not self._heard_at:
            return 0
        found: list[int] = []
        _run_logged(
            f"telling the gateway of stage {stage}", lambda: found.extend(_send_stage(stage))
        )
        return sum(found)

    def stop_services(self) -> None:
        """End the gateway, the workers and the controller, in this order.

        Running requests end with an error that names the shutdown. Has no effect on a cluster that
        another launcher started.
        """
        if not self._is_connected or self._joined.is_running:
            return
        if self._has_app:
            give_up = time.monotonic() + _FAIL_LIMIT_S
            while self.send_shutdown_stage("fail") and time.monotonic() < give_up:
                time.sleep(_POLL_S)
            _run_logged("ending the gateway", self._stop_gateway)
        if self._controller is not None:
            _run_logged(
                "ending the workers", partial(ask_controller, "stop", limit_s=_CALL_LIMIT_S)
            )
            _run_logged("ending the controller", end_leftovers)

    def stop_ray(self) -> None:
        """End the private Ray, or disconnect from the joined Ray."""
        if self._ray is not None:
            _run_logged("ending Ray", self._ray.stop)
        elif self._is_connected:
            import ray

            _run_logged("leaving Ray", ray.shutdown)

    # ---- parts ----------------------------------------------------------------------------

    def _join(self) -> str:
        try:
            return join_ray(self.plan.address, _JOIN_PATIENCE_S)
        except ConnectionError as err:
            raise StartError("ray", f"cannot join {self.plan.address}: {err}") from err

    def _start_workers(self) -> None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        from cluster.actors.ray_tools import error_summary
        from cluster.actors.worker_group import WorkerGroup
        from workers.process.worker.actor import ACTOR_CLASSES

        group = WorkerGroup(ACTOR_CLASSES)
        self._controller = create_controller(group, selector=self._joined.selector)
        plan = self.plan
        call = self._controller.start.remote(
            plan.config.to_dict(),
            list(plan.facts.banks),
            plan.profile,
            plan.asked,
            self._joined.free_cpus,
        )
        try:
            ray.get(call, timeout=plan.start_limit_s)
            self._wait_serving()
        except RayError as err:
            cause = err.cause if isinstance(err, RayTaskError) else None
            if isinstance(cause, ExpertMeshError):
                raise cause from None
            raise StartError("controller", error_summary(err)) from err

    def _wait_serving(self) -> None:
        import ray

        version = -1
        limit_s = self.plan.start_limit_s
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            call = self._controller.wait_snapshot.remote(version, _SNAPSHOT_WAIT_S)
            snapshot = ray.get(call, timeout=_SNAPSHOT_WAIT_S + _CALL_LIMIT_S)
            version = int(snapshot["version"])
            if snapshot["state"] == "STOPPED":
                raise StartError("cluster", str(snapshot["error"] or "stopped while starting"))
            if snapshot["state"] == "SERVING" or (
                self._joined.is_running and snapshot["state"] in ("DEGRADED", "RECOVERING")
            ):
                self.compute_threads = describe_threads(snapshot["workers"])
                return
            workers = [w for w in snapshot["workers"] if not is_gone(w["state"])]
            done = sum(int(w.get("loaded_bytes") or 0) for w in workers)
            total = sum(int(w.get("total_bytes") or 0) for w in workers)
            self._progress("weights" if total else "workers", done, total)
        raise StartError("cluster", f"not serving after {limit_s:g} s")

    def _start_gateway(self) -> None:
        from ray import serve

        from gateway.app import APP_NAME, build_app
        from gateway.auth.tls import tls_files

        logs.format_library_logs("ray", "ray.serve")

        section = self.plan.config.gateway
        nodes = self._joined.gateway_nodes
        location, options, prefix = "Disabled", None, None
        if section.serve_proxy is not None:
            location, prefix = "EveryNode" if nodes else "HeadOnly", "/"
            options = {"host": section.host, "port": section.serve_proxy, **tls_files(section)}
        serve.start(proxy_location=location, http_options=options)
        if self._joined.is_running and is_deployed(APP_NAME):
            return
        self._has_app = True
        app = build_app(self.plan.config.to_dict(), self._joined.selector, num_nodes=len(nodes))
        serve.run(app, name=APP_NAME, route_prefix=prefix)

    def _not_ready_reasons(self) -> list[str]:
        """Ask a gateway replica through Ray why it is not ready; an empty list means ready."""
        try:
            reasons: list[str] = self._ask_gateway("not_ready_reasons")
        except StartError as err:
            return [err.reason]
        return reasons

    def _ask_gateway(self, method: str) -> Any:
        """Call a method of a gateway replica and return its result. Raises ``StartError``."""
        from ray import serve
        from ray.exceptions import RayError

        from gateway.app import APP_NAME, DEPLOYMENT_NAME

        handle: Any = serve.get_deployment_handle(DEPLOYMENT_NAME, APP_NAME)
        try:
            return getattr(handle, method).remote().result(timeout_s=_CALL_LIMIT_S)
        except (RayError, TimeoutError) as err:
            raise StartError("gateway", str(err)) from err

    def _stop_gateway(self) -> None:
        from ray import serve

        from gateway.app import APP_NAME

        serve.delete(APP_NAME, _blocking=self._ray is None)


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


def _send_stage(stage: ShutdownStage) -> list[int]:
    """Tell every gateway replica the shutdown stage; return numbers of running requests.

    The list has one number for each replica that responds.
    """
    from ray import serve

    from gateway.app import APP_NAME, DEPLOYMENT_NAME

    handle: Any = serve.get_deployment_handle(DEPLOYMENT_NAME, APP_NAME)
    response = handle.broadcast("end", stage)
    found = response.results(timeout_s=_TELL_LIMIT_S, return_exceptions=True)
    return [one for one in found if isinstance(one, int)]


def warm_up() -> None:
    """Import Ray, which every start needs, while the CLI process still checks the request."""
    import ray  # noqa: F401


def _import_services() -> None:
    """Import the gateway while Ray's processes start.

    Import errors are ignored; a later import fails.
    """
    with contextlib.suppress(ImportError):
        import gateway.app  # noqa: F401


def _wait_all(futures: Iterable[Future[None]]) -> None:
    """Wait for all futures; raise the first error at once. Short waits let signal handlers run."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def _run_logged(what: str, action: Callable[[], Any]) -> None:
    """Run one step of the shutdown; log a failure, so that the next step runs."""
    try:
        action()
    except Exception:
        logger.exception("%s failed", what)
