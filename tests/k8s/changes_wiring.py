"""Changes of what leads from one object to another, see ``changes``."""

from __future__ import annotations

from typing import Any

from tests.k8s.edits import MULTI, Row, box, pod, set_engine, set_env, spec
from tests.k8s.kuberay import Manifests

_OTHER = {"name": "expertmesh-other", "key": "auth_token"}


def _job(m: Manifests) -> dict[str, Any]:
    found: dict[str, Any] = spec(m, "Job", "up")
    return found


def _variable(container: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [e for e in container["env"] if e["name"] == name]
    variable: dict[str, Any] = found
    return variable


def _job_box(m: Manifests) -> dict[str, Any]:
    found: dict[str, Any] = _job(m)["template"]["spec"]["containers"][0]
    return found


def _rule(m: Manifests, kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = spec(m, kind, name)["rules"][0]
    return found


def _endpoint(m: Manifests, name: str) -> dict[str, Any]:
    found: dict[str, Any] = spec(m, "PodMonitor", name)["podMetricsEndpoints"][0]
    return found


def _redis(m: Manifests) -> dict[str, Any]:
    found: dict[str, Any] = m.cluster["spec"]["gcsFaultToleranceOptions"]
    return found


def _forget(m: Manifests, kind: str, name: str) -> None:
    selector = spec(m, kind, name)["selector"]
    selector.get("matchLabels", selector).pop("ray.io/cluster")


def _udp(m: Manifests) -> None:
    spec(m, "NetworkPolicy", "gateway")["ingress"][0]["ports"][0].update(protocol="UDP")


def _outwards(m: Manifests) -> None:
    spec(m, "NetworkPolicy", "cluster").update(policyTypes=["Egress"])


CHANGES: list[Row] = [
    ("job", MULTI, "too little time", lambda m: _job(m).update(activeDeadlineSeconds=600)),
    ("job", MULTI, "a single try", lambda m: _job(m).update(backoffLimit=0)),
    (
        "job",
        MULTI,
        "another cluster",
        lambda m: _variable(_job_box(m), "CLUSTER").update(value="b"),
    ),
    (
        "job",
        MULTI,
        "no token",
        lambda m: _job_box(m).update(env=[_variable(_job_box(m), "CLUSTER")]),
    ),
    (
        "job",
        MULTI,
        "another cluster's token",
        lambda m: _variable(_job_box(m), "RAY_AUTH_TOKEN").update(
            valueFrom={"secretKeyRef": _OTHER}
        ),
    ),
    (
        "job",
        MULTI,
        "a token nobody asks for",
        lambda m: m.cluster["spec"].pop("authOptions"),
    ),
    ("variables", MULTI, "no address", lambda m: box(m, "experts")["env"].pop(3)),
    (
        "variables",
        MULTI,
        "gateways of another cluster",
        lambda m: set_env(m, "attention", "EXPERTMESH_URL", "http://expertmesh-gateway:8000"),
    ),
    (
        "variables",
        MULTI,
        "statistics",
        lambda m: set_env(m, "gateway", "RAY_USAGE_STATS_ENABLED", "1"),
    ),
    (
        "keys",
        MULTI,
        "a file of another name",
        lambda m: pod(m, "gateway")["volumes"][1]["secret"]["items"][0].update(path="clients"),
    ),
    ("keys", MULTI, "no admin key", lambda m: set_engine(m, admin_key_file=None)),
    (
        "keys",
        MULTI,
        "a client's key for the admin ports",
        lambda m: set_engine(m, admin_key_file="/etc/expertmesh/keys/keys"),
    ),
    (
        "keys",
        MULTI,
        "weights that may be written",
        lambda m: box(m, "experts")["volumeMounts"][0].pop("readOnly"),
    ),
    ("head", MULTI, "no Redis", lambda m: m.cluster["spec"].pop("gcsFaultToleranceOptions")),
    ("head", MULTI, "Redis without a port", lambda m: _redis(m).update(redisAddress="redis")),
    (
        "head",
        MULTI,
        "a minute until a node is lost",
        lambda m: set_env(m, "headgroup", "RAY_health_check_failure_threshold", "20"),
    ),
    (
        "head",
        MULTI,
        "a dashboard for itself",
        lambda m: m.group("headgroup").spec["rayStartParams"].pop("dashboard-host"),
    ),
    (
        "routes",
        MULTI,
        "a limit for streams",
        lambda m: _rule(m, "HTTPRoute", "http")["timeouts"].update(request="30s"),
    ),
    (
        "routes",
        MULTI,
        "a service less",
        lambda m: _rule(m, "GRPCRoute", "grpc")["matches"].pop(),
    ),
    (
        "routes",
        MULTI,
        "the admin service",
        lambda m: _rule(m, "GRPCRoute", "grpc")["matches"].append(
            {"method": {"type": "Exact", "service": "expertmesh.v1.Admin"}}
        ),
    ),
    ("monitors", MULTI, "no key", lambda m: _endpoint(m, "gateway").pop("authorization")),
    ("monitors", MULTI, "another path", lambda m: _endpoint(m, "gateway").update(path="/stats")),
    (
        "fabric",
        MULTI,
        "devices for one pool",
        lambda m: [
            box(m, "attention")["resources"][kind].pop("rdma/hca_shared_devices_a")
            for kind in ("limits", "requests")
        ],
    ),
    (
        "fabric",
        MULTI,
        "pages that may be moved",
        lambda m: box(m, "experts")["securityContext"]["capabilities"].pop("add"),
    ),
    (
        "fabric",
        MULTI,
        "two interfaces",
        lambda m: set_env(m, "experts", "GLOO_SOCKET_IFNAME", "eth1"),
    ),
    (
        "images",
        MULTI,
        "another user",
        lambda m: pod(m, "experts")["securityContext"].update(runAsUser=1001),
    ),
    ("images", MULTI, "pulled again", lambda m: box(m, "gateway").update(imagePullPolicy="Always")),
    (
        "labels",
        MULTI,
        "a Service of nobody",
        lambda m: m.named("Service", "expertmesh-inside")["metadata"].pop("labels"),
    ),
    ("selectors", MULTI, "both clusters", lambda m: _forget(m, "Service", "gateway")),
    ("selectors", MULTI, "a PDB of both", lambda m: _forget(m, "PodDisruptionBudget", "experts")),
    ("open ports", MULTI, "UDP", _udp),
    ("open ports", MULTI, "no direction", _outwards),
]
