"""Starts and ends the parts of one cluster: Ray, the fleets of its models, the gateway.

The only module that imports the classes of workers, controller and gateway together.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config.gateway import ShutdownStage
from cluster.core.errors import NotReadyError, StartError
from cluster.core.fleets import namespace_of
from cluster.core.process import ProcessIdentity
from cluster.launch.fleet import AWAY_LIMIT_S, CALL_LIMIT_S, Fleet
from cluster.launch.joining import JoinedRay, inspect_ray, is_deployed
from cluster.launch.local_ray import PrivateRay, join_ray
from cluster.launch.model_plan import ModelPlan
from cluster.launch.models_actor import ask_models_actor, create_models_actor
from cluster.launch.plan import LaunchPlan
from cluster.launch.readiness import wait_ready
from cluster.launch.teardown import end_leftovers, stop_fleets
from cluster.tracing import logs

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_TELL_LIMIT_S = 1.0
_FAIL_LIMIT_S = 1.0
_JOIN_PATIENCE_S = 30.0
"""Seconds for a joined Ray to accept connections, since Ray may be starting."""

_REFRESH_S = 10.0
"""Seconds after which the active revisions are looked up again."""

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
        self._fleets: list[Fleet] = []
        """The fleets that serve, or are started."""
        self._is_connected = False
        self._has_services = False
        self._has_app = False
        self._is_ready = False
        self._served_at = time.monotonic()
        """Time at which a model was last known to be served."""
        self._asked_at = self._served_at
        """Time at which the table of models was last asked for the active revisions."""

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
        """Start the fleets and the gateway; return when clients can call.

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
        create_models_actor(self.plan.models, self._joined.selector, self.plan.start_limit_s)
        self._is_ready = True

    def find_loss(self) -> str | None:
        """Return the reason why no model can be served any more; None while one can.

        See ``Fleet.find_loss``. A model that is lost alone leaves the others serving.
        """
        lost: dict[str, str] = {}
        for fleet in self._fleets:
            if (loss := fleet.find_loss()) is not None:
                lost[fleet.namespace] = loss
        now_s = time.monotonic()
        if not lost:
            self._served_at = now_s
        if not lost and now_s < self._asked_at + _REFRESH_S:
            return None
        self._asked_at = now_s
        return None if self._serves_without(lost) or not lost else next(iter(lost.values()))

    def _serves_without(self, lost: Collection[str]) -> bool:
        """Return whether another fleet serves a model, or will.

        From now on, the fleets of the active revisions are watched: others may be active by now.
        """
        is_one_left = len(lost) < len(self._fleets)
        try:
            fleets, is_loading = ask_models_actor("active_fleets", limit_s=CALL_LIMIT_S)
        except NotReadyError as err:
            is_away = not isinstance(err.__cause__, ValueError)  # else there is no such actor
            # Ray restarts a killed actor in seconds
            return is_one_left or (is_away and time.monotonic() < self._served_at + AWAY_LIMIT_S)
        known = {fleet.namespace: fleet for fleet in self._fleets}
        active = list(map(namespace_of, fleets))
        if active:  # else the last ones are watched until another one serves
            self._fleets = [known.get(namespace) or Fleet(namespace) for namespace in active]
        serves: bool = is_loading or any(namespace not in lost for namespace in active)
        self._served_at = time.monotonic() if serves else self._served_at
        return serves

    def processes(self) -> list[ProcessIdentity]:
        """Return the processes of the private Ray on this host; empty for a joined Ray."""
        return self._ray.processes() if self._ray is not None and self._is_connected else []

    def send_shutdown_stage(self, stage: ShutdownStage) -> int:
        """Tell every gateway replica the shutdown stage; return the number of running requests.

        Has no effect, and returns 0, unless this launcher has started the gateway completely.
        """
        if not self._has_app or not self._is_ready:
            return 0
        found: list[int] = []
        _run_logged(
            f"telling the gateway of stage {stage}", lambda: found.extend(_send_stage(stage))
        )
        return sum(found)

    def stop_services(self) -> None:
        """End the gateway, the workers and the controllers, in this order.

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
        if self._has_services:
            _run_logged("ending the workers", partial(stop_fleets, CALL_LIMIT_S))
            _run_logged("ending the controllers", end_leftovers)

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
        """Start the fleets of all models, and return when all serve.

        Fleets of a cluster that has started are not touched: revisions may be replaced now.
        """
        if self._joined.has_table:
            return
        loaded: dict[str, tuple[int, int]] = {}

        def start(fleet: Fleet, model: ModelPlan) -> None:
            def on_progress(done: int, total: int) -> None:
                loaded[fleet.namespace] = done, total
                sums = [sum(amounts) for amounts in zip(*loaded.copy().values(), strict=True)]
                self._progress("weights" if sums[1] else "workers", *sums)

            joined = self._joined
            fleet.start(
                model,
                on_progress,
                asked=self.plan.asked,
                limit_s=self.plan.start_limit_s,
                selector=joined.selector,
                free_cpus=joined.free_cpus,
                is_running=joined.is_running,
            )

        models = self.plan.models
        self._has_services = True
        self._fleets = [Fleet(model.config.namespace) for model in models]
        pool = ThreadPoolExecutor(len(models))
        try:
            pairs = zip(self._fleets, models, strict=True)
            _wait_all([pool.submit(start, fleet, model) for fleet, model in pairs])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self.compute_threads = "; ".join(fleet.compute_threads for fleet in self._fleets)

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
        configs = [model.config.to_dict() for model in self.plan.models]
        app = build_app(configs, self._joined.selector, num_nodes=len(nodes))
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
            return getattr(handle, method).remote().result(timeout_s=CALL_LIMIT_S)
        except (RayError, TimeoutError) as err:
            raise StartError("gateway", str(err)) from err

    def _stop_gateway(self) -> None:
        from ray import serve

        from gateway.app import APP_NAME

        serve.delete(APP_NAME, _blocking=self._ray is None)


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
