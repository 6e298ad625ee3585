"""Inspects an existing Ray cluster: its nodes, its Ray Serve, a running expertmesh cluster.

Options that the joined Ray cannot satisfy are rejected here, before anything is created.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from cluster.actors.controller_client import ask_controller
from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection, is_loopback
from cluster.config.resources import NodeResources
from cluster.core.codec import from_plain
from cluster.core.errors import ConfigError, NotReadyError, StartError
from cluster.core.fleets import CONTROLLER_NAME, MODELS_NAME, NAMESPACE
from cluster.core.model_table import LOADING_STATES, ModelTable
from cluster.core.node_labels import selector_for
from cluster.launch.model_plan import ModelPlan
from cluster.launch.models_actor import ask_models_actor
from cluster.launch.plan import (
    EVERY_INTERFACE,
    LaunchPlan,
    check_ports,
    option_differences,
)
from cluster.launch.teardown import end_leftovers

logger = logging.getLogger(__name__)

GATEWAY = "gateway"
"""Value of the role label of nodes that run gateway replicas and the controller."""
_POLL_S = 0.2
_ANSWER_LIMIT_S = 60.0
_CALL_LIMIT_S = 10.0
_FREE_LIMIT_S = 10.0
"""Longest wait, in seconds, for Ray to free ended actors' resources; nodes report every 0.1 s."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JoinedRay:
    """State of the joined Ray cluster, and the launch plan adapted to it."""

    plan: LaunchPlan
    """Launch plan with mode and addresses resolved for the joined Ray cluster."""
    gateway_nodes: tuple[str, ...] = ()
    """Addresses of nodes labelled for the gateway; if empty, Ray's head node runs the gateway."""
    selector: dict[str, str] = dataclasses.field(default_factory=dict)
    """Ray label selector of the nodes labelled for the gateway; empty without such nodes."""
    free_cpus: float | None = None
    """Number of CPUs that other users of the joined Ray left free before expertmesh started
    anything; None for a private Ray, or if the cluster is running.
    """
    is_running: bool = False
    """Whether the planned cluster is already running or starting."""
    has_table: bool = False
    """Whether the cluster has started: its table of models says which fleets there are."""


def inspect_ray(plan: LaunchPlan, address: str) -> JoinedRay:
    """Inspect the Ray cluster at ``address``, which this process has joined; adapt the plan to it.

    Raises ``ConfigError`` and ``StartError``.
    """
    from cluster.actors.ray_tools import live_actors

    nodes = wait_nodes(plan.wait_nodes, plan.start_limit_s)
    gateways = tuple(n for n in nodes if n.labels.role == GATEWAY)
    plan = dataclasses.replace(plan, gateway_address=_gateway_address(plan, gateways))
    selector = selector_for(GATEWAY, [n.labels for n in gateways]) if gateways else {}
    joined = JoinedRay(
        plan=plan, gateway_nodes=tuple(n.address for n in gateways), selector=selector
    )
    actors = live_actors()
    if plan.command == "up" and (NAMESPACE, MODELS_NAME) in actors:
        served = _served_plan(plan)
        if served is not None:
            return dataclasses.replace(joined, plan=served, is_running=True, has_table=True)
    elif plan.command == "up" and (NAMESPACE, CONTROLLER_NAME) in actors:
        config = _running_config(plan)
        if config is not None:
            others = tuple(map(_as_running, plan.others))
            started = dataclasses.replace(plan, config=config, others=others)  # tokens and ports
            return dataclasses.replace(joined, plan=started, is_running=True)
    if actors and live_actors():
        raise ConfigError("address", plan.address, "already runs an expertmesh cluster")
    _check_ports(plan, is_here=not gateways)
    check_ray_token(plan, nodes, address)
    free_cpus = _free_cpus()
    plan = _resolve(plan, nodes, free_cpus)
    return dataclasses.replace(joined, plan=plan, free_cpus=free_cpus)


def wait_nodes(count: int, limit_s: float) -> tuple[NodeResources, ...]:
    """Wait until Ray has at least ``count`` live nodes, and return all live nodes.

    Raises ``StartError`` after ``limit_s`` seconds, and ``ConfigError`` for an invalid expertmesh
    label.
    """
    from cluster.actors.ray_tools import cluster_nodes

    deadline = time.monotonic() + limit_s
    while len(nodes := cluster_nodes(is_strict=True)) < count:
        if time.monotonic() > deadline:
            raise StartError("ray", f"has {len(nodes)} of {count} nodes after {limit_s:g} s")
        time.sleep(_POLL_S)
    return nodes


def _free_cpus() -> float:
    from cluster.actors.ray_tools import free_resources

    return free_resources().get("CPU", 0.0)


def _reserved_cpus() -> float:
    """Return the number of CPUs on live nodes that placement groups of workers reserve."""
    from cluster.actors.ray_tools import cluster_nodes, live_placement_groups

    alive = {node.node_id for node in cluster_nodes()}
    return sum(
        float(bundle.get("CPU", 0.0))
        for entry in live_placement_groups()
        for index, bundle in entry["bundles"].items()
        if entry["bundles_to_node_id"].get(index) in alive
    )


def wait_free_cpus(wanted: float, limit_s: float, count: Callable[[], float] = _free_cpus) -> None:
    """Wait until Ray counts ``wanted`` CPUs as free; log a warning after ``limit_s`` seconds.

    Other users of the Ray cluster may have taken some of the CPUs.
    """
    deadline = time.monotonic() + limit_s
    while (free := count()) < wanted - 1e-3:  # sums of fractions
        if time.monotonic() > deadline:
            logger.warning("Ray has %g of %g CPUs free after %g s", free, wanted, limit_s)
            return
        time.sleep(_POLL_S)


def _running_config(plan: LaunchPlan) -> ClusterConfig | None:
    """Return the running cluster's configuration, or None if the start of that cluster failed.

    Ends the actors of a failed start. Raises ``ConfigError`` if the options of the running cluster
    differ from the options of ``plan``, and ``StartError`` if the controller does not reply.
    """
    try:
        origin = ask_controller("origin", limit_s=_ANSWER_LIMIT_S)
        state = ask_controller("snapshot", limit_s=_ANSWER_LIMIT_S)["state"]
    except NotReadyError as err:
        raise StartError("controller", f"runs and does not answer: {err}") from err
    if origin["config"] is None or state == "STOPPED":
        _end_failed()
        return None
    _check_same(plan, origin["asked"])
    return ClusterConfig.from_dict(origin["config"])


def _end_failed() -> None:
    """End the actors of a cluster that does not serve, and wait for their resources."""
    logger.info("ending the actors of a failed start")
    wanted = _free_cpus() + _reserved_cpus()
    end_leftovers()
    wait_free_cpus(wanted, _FREE_LIMIT_S)


def _check_same(plan: LaunchPlan, asked: Mapping[str, str] | None) -> None:
    """Raise ``ConfigError`` if a cluster was started with other options than ``plan``."""
    differences = option_differences(asked or {}, plan.asked)
    if differences:
        text = "; ".join(differences)
        rule = f"runs a cluster with other settings ({text}): expertmesh down first"
        raise ConfigError("address", plan.address, rule)


def _served_plan(plan: LaunchPlan) -> LaunchPlan | None:
    """Return the plan with the active revisions of a cluster; None if none serves or will.

    Ends the actors of a cluster that does not serve. Raises ``ConfigError`` if the options of the
    cluster differ from those of ``plan``, unless the first model has another revision by now, and
    ``StartError`` if the table cannot be read.
    """
    try:
        found = ask_models_actor("table", limit_s=_ANSWER_LIMIT_S)
    except NotReadyError as err:
        raise StartError("models", str(err)) from err
    table = from_plain(found, ModelTable)
    models = [
        from_plain(revision.plan, ModelPlan)
        for entry, revision in table
        if revision.name == entry.active
    ]
    is_loading = any(revision.state in LOADING_STATES for _, revision in table)
    if not is_loading and all(_is_stopped(model.config.namespace) for model in models):
        _end_failed()
        return None
    if models[0].config.namespace == NAMESPACE:
        with contextlib.suppress(NotReadyError):  # its controller restarts, or has ended
            _check_same(plan, ask_controller("origin", limit_s=_ANSWER_LIMIT_S)["asked"])
    fields = {field.name: getattr(models[0], field.name) for field in dataclasses.fields(ModelPlan)}
    return dataclasses.replace(plan, **fields, others=tuple(models[1:]))


def _is_stopped(namespace: str) -> bool:
    """Return whether a fleet has ended or cannot serve any more."""
    try:
        snapshot = ask_controller("snapshot", limit_s=_ANSWER_LIMIT_S, namespace=namespace)
    except NotReadyError as err:
        return isinstance(err.__cause__, ValueError)  # else it restarts
    return bool(snapshot["state"] == "STOPPED")


def _as_running(model: ModelPlan) -> ModelPlan:
    """Return the plan of a further model with the configuration that its controller runs.

    Raises ``StartError`` if its controller does not run or reply.
    """
    namespace = model.config.namespace
    try:
        found = ask_controller("origin", limit_s=_ANSWER_LIMIT_S, namespace=namespace)["config"]
    except NotReadyError as err:
        name = model.config.model.served_model_name
        raise StartError("controller", f"the one for {name} does not answer: {err}") from err
    config = model.config if found is None else ClusterConfig.from_dict(found)
    return dataclasses.replace(model, config=config)


def _resolve(plan: LaunchPlan, nodes: tuple[NodeResources, ...], free_cpus: float) -> LaunchPlan:
    """Return the plan with ``--mode auto`` resolved; check that the workers fit on the nodes."""
    plan = plan.planned(nodes, free_cpus)
    for workers in (model.config.workers for model in plan.models):
        if workers.mode_reason:
            logger.info("mode %s: %s", workers.mode, workers.mode_reason)
    return plan


def _gateway_address(plan: LaunchPlan, gateways: tuple[NodeResources, ...]) -> str:
    """Return the gateway's address for clients if ``host`` is every interface, else empty.

    Raises ``ConfigError`` if ``host`` cannot be reached from outside the gateway's node.
    """
    host = plan.config.gateway.host
    if host in EVERY_INTERFACE:
        return gateways[0].address if gateways else _head_address()
    if gateways and is_loopback(host):
        rule = "reaches one node only, but nodes are labelled for the gateway: use 0.0.0.0"
        raise ConfigError("host", host, rule)
    return ""


def _check_ports(plan: LaunchPlan, is_here: bool) -> None:
    """Raise ``ConfigError`` for ports in use on this host, or an unsuitable joined Ray Serve."""
    from cluster.actors.ray_tools import node_address

    section = plan.config.gateway
    ports, options = section.public_ports, running_serve()
    if options is not None and section.serve_proxy is not None:
        check_serve(section, options)
        del ports["serve_proxy"]  # Serve listens there already
    if is_here and _head_address() == node_address():
        check_ports(section.host, ports)


def _head_address() -> str:
    """Return the IP address of Ray's live head node, or of this node if there is none."""
    import ray

    from cluster.actors.ray_tools import HEAD_NODE, node_address

    found = cast("list[dict[str, Any]]", ray.nodes())  # type: ignore[no-untyped-call]
    heads = [n for n in found if n["Alive"] and HEAD_NODE in n["Resources"]]
    return str(heads[0]["NodeManagerAddress"]) if heads else node_address()


def check_serve(section: GatewaySection, options: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` if Ray Serve's port or certificate differs from ``section``."""
    port = None if options["location"] == "Disabled" else int(options["port"])
    if port != section.serve_proxy:
        rule = f"differs from {port}, the one HTTP port of Serve on the joined Ray cluster"
        raise ConfigError("serve_proxy", section.serve_proxy, rule)
    wanted, there = section.tls_cert, options.get("ssl_certfile")
    if wanted != there:
        rule = f"differs from {there}, the certificate of Serve on the joined Ray cluster"
        raise ConfigError("tls_cert", wanted, rule)


def running_serve() -> Mapping[str, Any] | None:
    """Return the HTTP options of the joined Ray's Serve; None if Serve does not run.

    The result also has the ``location`` of Serve's proxies.
    """
    import ray
    from ray import serve

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    client: Any = serve.context._get_global_client()
    details: Mapping[str, Any] = client.get_serve_details()
    return {**details["http_options"], "location": details["proxy_location"]}


def check_ray_token(plan: LaunchPlan, nodes: Sequence[NodeResources], address: str) -> None:
    """Raise ``ConfigError`` if a Ray of several hosts accepts calls without a token.

    ``--allow-unauthenticated`` permits such a Ray.
    """
    is_lax = plan.config.gateway.allow_unauthenticated or len({n.address for n in nodes}) < 2
    if not is_lax and allows_unauthenticated(address):
        rule = "lets every host of the network run code: start Ray on every host with token "
        rule += "authentication (RAY_AUTH_MODE=token), or set --allow-unauthenticated"
        raise ConfigError("address", address, rule)


def allows_unauthenticated(address: str) -> bool:
    """Return whether the Ray at ``address`` accepts calls without a token.

    The test is a call to Ray's GCS. The Ray client of this process cannot tell, because a Ray
    without tokens also accepts a client with a token.
    """
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2
    stubs: Any = gcs_service_pb2_grpc
    with grpc.insecure_channel(address) as channel:
        nodes = stubs.NodeInfoGcsServiceStub(channel)
        try:
            nodes.GetAllNodeInfo(messages.GetAllNodeInfoRequest(), timeout=_CALL_LIMIT_S)
        except grpc.RpcError:
            return False
    return True


def is_deployed(app: str) -> bool:
    """Return whether the connected Ray's Serve runs or deploys the application ``app``."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    found = serve.status().applications.get(app)
    good = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING)
    return found is not None and found.status in good
