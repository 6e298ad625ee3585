"""What leads from one object to another: tokens, keys, variables, routes, monitors, Redis.

A check yields what is wrong in a rendered overlay, nothing if all is well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from grpc_reflection.v1alpha import reflection

from protos import inference_pb2
from tests.k8s.checks_network import WORKERS, terms
from tests.k8s.kuberay import PART_OF, Group, Manifests, quantity
from tests.paths import ROOT

DETECTION_S = 15.0
"""The head calls a silent node dead at the latest after this time; by default after 65 s."""
RPC_SERVICES = {
    inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
    "grpc.health.v1.Health",
    reflection.SERVICE_NAME,
}
FABRIC = {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA"}
"""Variables that settings.yaml gives values to; the other two are RoCE's."""
ROCE = {"NCCL_IB_GID_INDEX": "3", "NCCL_NET_GDR_LEVEL": "PHB"}


def job(m: Manifests) -> Iterator[str]:
    """The Job goes on trying for as long as pods may take, and shows Ray its token."""
    (found,) = m.kind("Job")
    if found["metadata"]["name"] != f"{m.name}-up":
        yield f"Job: is called {found['metadata']['name']}"
    spec = found["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    room_s = max(_startup_s(group) for group in m.groups)
    if not 2 * room_s <= spec.get("activeDeadlineSeconds", 0) <= 43200:
        yield f"Job: has {spec.get('activeDeadlineSeconds')} s, pods may take {room_s:g} to start"
    if not 10 <= spec.get("backoffLimit", 6) <= 100:
        yield f"Job: tries {spec.get('backoffLimit')} times"
    if pod.get("serviceAccountName") not in {
        a["metadata"]["name"] for a in m.kind("ServiceAccount")
    } - {g.pod.get("serviceAccountName") for g in m.groups}:
        yield "Job: has no account of its own"
    for kind in ("requests", "limits"):
        takes = container.get("resources", {}).get(kind, {})
        cpu, memory = quantity(takes.get("cpu", 0)), quantity(takes.get("memory", 0))
        if not (0.1 <= cpu <= 1 and 2**29 <= memory <= 2**30):
            yield f"Job: {kind} {takes} for a client that only waits"
    variables = {e.get("name"): e for e in container.get("env", [])}
    if variables.get("CLUSTER", {}).get("value") != m.name:
        yield "Job: is sent to another cluster"
    asks = m.cluster["spec"].get("authOptions", {}).get("mode") == "token"
    shown = variables.get("RAY_AUTH_TOKEN", {}).get("valueFrom", {}).get("secretKeyRef")
    mode = variables.get("RAY_AUTH_MODE", {}).get("value")
    wanted = ("token", {"name": m.name, "key": "auth_token"}) if asks else (None, None)
    if (mode, shown) != wanted:
        yield f"Job: shows {shown} in mode {mode}, where {wanted} is asked for"


def _startup_s(group: Group) -> float:
    probe = group.container.get("startupProbe", {})
    return float(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))


def variables(m: Manifests) -> Iterator[str]:
    """Variables of Ray's containers: who they are, where gateways are, whose key they show."""
    for group in m.groups:
        given = {e["name"]: e for e in group.container.get("env", []) if "name" in e}
        if _field(given, "POD_IP", "fieldRef") != {"fieldPath": "status.podIP"}:
            yield f"{group.name}: does not know its address"
        expected = {
            "OMP_NUM_THREADS": "1",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "5",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        if group.name != "headgroup":
            expected |= {"CLUSTER": m.name, "EXPERTMESH_URL": "http://$(CLUSTER)-inside:8000"}
            names = [e.get("name") for e in group.container["env"]]
            if names.index("CLUSTER") > names.index("EXPERTMESH_URL"):
                yield f"{group.name}: CLUSTER is not known yet where EXPERTMESH_URL refers to it"
            key = _field(given, "EXPERTMESH_API_KEY", "secretKeyRef") or {}
            if (key.get("name"), key.get("key"), key.get("optional")) != (
                *(_keys_secret(m), "inside"),
                True,
            ):
                yield f"{group.name}: shows the key {key}"
        for name, value in expected.items():
            if group.env.get(name) != value:
                yield f"{group.name}: {name} is {group.env.get(name)}, not {value}"


def _field(given: dict[str, Any], name: str, kind: str) -> Any:
    return given.get(name, {}).get("valueFrom", {}).get(kind)


def _keys_secret(m: Manifests) -> str:
    """Where the keys are that gateways ask for; ``none`` without."""
    for volume in m.group("gateway").pod["volumes"]:
        if volume.get("name") == "keys" and "secret" in volume:
            return str(volume["secret"].get("secretName"))
    return "none"


def keys(m: Manifests) -> Iterator[str]:
    """The files of keys that engine.yaml names are made of the Secret, on head and gateways.

    That of the cluster's own key is the admin ports': a client's shows no nodes and no experts.
    """
    paths = [m.engine.get(f"{name}-key-file") for name in ("api", "admin")]
    for group in (m.group("headgroup"), m.group("gateway")) if any(paths) else ():
        (volume,) = [v for v in group.pod["volumes"] if v.get("name") == "keys"]
        items = volume.get("secret", {}).get("items")
        mounts = [v for v in group.container["volumeMounts"] if v.get("name") == "keys"]
        files = [f"{v['mountPath']}/{i.get('path')}" for v in mounts for i in items or []]
        if files != paths or [i.get("key") for i in items or []] != ["keys", "inside"]:
            yield f"{group.name}: {paths} are made of {items}"
        if volume.get("secret", {}).get("secretName") != _keys_secret(m):
            yield f"{group.name}: keys are not those of the gateways"
    for group in m.groups:
        for mount in group.container["volumeMounts"]:
            if mount["name"] in ("weights", "keys", "engine") and mount.get("readOnly") is not True:
                yield f"{group.name}: may write to {mount['name']}"


def head(m: Manifests) -> Iterator[str]:
    """The head finds lost nodes soon, is reached by the Job, and outlives itself where it may."""
    group = m.group("headgroup")
    numbers = {k: float(v) for k, v in group.env.items() if k.startswith("RAY_health_check_")}
    names = ("initial_delay_ms", "period_ms", "timeout_ms", "failure_threshold")
    delay, period, timeout, misses = (
        numbers.get(f"RAY_health_check_{name}", 60000.0) for name in names
    )
    if not delay + misses * (period + timeout) <= 1000 * DETECTION_S:
        yield f"headgroup: finds a lost node after {numbers}"
    if timeout < 1000:
        yield f"headgroup: calls a busy node dead after {timeout:g} ms"
    if group.spec["rayStartParams"].get("dashboard-host") != "$POD_IP":
        yield "headgroup: the Job does not reach its dashboard, or other networks do"
    if group.ports.get("gcs-server") != 6379:
        yield f"headgroup: the operator's Service leads to {group.ports}"
    redis = m.cluster["spec"].get("gcsFaultToleranceOptions")
    if redis is None:
        if len(m.groups[2:]) and sum(g.limit("nvidia.com/gpu") * g.replicas for g in m.groups) > 8:
            yield "headgroup: a lost head takes several nodes of GPUs along"
        return
    if not re.fullmatch(r"(rediss?://)?[\w.-]+:\d+", str(redis.get("redisAddress"))):
        yield f"headgroup: Redis is at {redis.get('redisAddress')}"
    secret = redis.get("redisPassword", {}).get("valueFrom", {}).get("secretKeyRef", {})
    if secret.get("key") != "password" or not secret.get("name"):
        yield f"headgroup: the password of Redis is {secret}"


def routes(m: Manifests) -> Iterator[str]:
    """Routes lead all that clients call to gateways, for as long as a stream may take."""
    for route in m.kind("HTTPRoute") + m.kind("GRPCRoute"):
        name, spec = route["metadata"]["name"], route["spec"]
        if name != f"expertmesh-{route['kind'].removesuffix('Route').lower()}":
            yield f"{name}: a second cluster would have a second one"
        if len(spec.get("hostnames", [])) != 1:
            yield f"{name}: takes {spec.get('hostnames')}"
        parents = [(p.get("namespace"), p.get("name")) for p in spec.get("parentRefs", [])]
        if len(parents) != 1 or not all(parents[0]):
            yield f"{name}: comes from {parents}"
        if len(spec["rules"]) != 1 or len(spec["rules"][0].get("backendRefs", [])) != 1:
            yield f"{name}: leads to several places, or to none"
    for rule in (r for route in m.kind("HTTPRoute") for r in route["spec"]["rules"]):
        if rule.get("matches") != [{"path": {"type": "PathPrefix", "value": "/"}}]:
            yield f"HTTPRoute: takes {rule.get('matches')} alone"
        if rule.get("timeouts") != {"request": "0s", "backendRequest": "0s"}:
            yield f"HTTPRoute: streams end after {rule.get('timeouts')}"
    for rule in (r for route in m.kind("GRPCRoute") for r in route["spec"]["rules"]):
        given = [match.get("method", {}) for match in rule.get("matches", [])]
        if {x.get("service") for x in given} != RPC_SERVICES:
            yield f"GRPCRoute: takes {given}"
        if any(x.get("type", "Exact") != "Exact" for x in given):
            yield "GRPCRoute: takes services by patterns"


def monitors(m: Manifests) -> Iterator[str]:
    """Prometheus asks gateways for our metrics, with a key, and every pod for Ray's."""
    for monitor in m.kind("PodMonitor"):
        name, endpoints = monitor["metadata"]["name"], monitor["spec"]["podMetricsEndpoints"]
        if len(endpoints) != 1:
            yield f"{name}: asks {len(endpoints)} ports"
            continue
        (asked,) = endpoints
        seconds = re.fullmatch(r"(\d+)s", str(asked.get("interval")))
        if seconds is None or not 5 <= int(seconds[1]) <= 60:
            yield f"{name}: asks every {asked.get('interval')}"
        if asked.get("path", "/metrics") != "/metrics":
            yield f"{name}: asks for {asked['path']}"
        wanted = {"name": _keys_secret(m), "key": "inside"} if asked["port"] == "http" else None
        if asked.get("authorization", {}).get("credentials") != wanted:
            yield f"{name}: shows {asked.get('authorization')}"
    asked_ports = sorted(
        e["port"] for x in m.kind("PodMonitor") for e in x["spec"]["podMetricsEndpoints"]
    )
    if asked_ports not in ([], ["http", "metrics"]):
        yield f"PodMonitors: ask for {asked_ports}"


def fabric(m: Manifests) -> Iterator[str]:
    """Where pods ask for RDMA devices: both pools do, with NCCL's variables and locked memory."""
    asks = {g.name for g in m.groups if any(r.startswith("rdma/") for r in _limits(g))}
    if asks and asks != set(WORKERS):
        yield f"RDMA: only {sorted(asks)} have devices"
    for group in m.groups:
        names = {n for n in group.env if n.startswith(("NCCL_", "GLOO_"))}
        wanted = FABRIC | ROCE.keys() if group.name in asks else set()
        if names != wanted:
            yield f"{group.name}: has variables {sorted(names)}"
            continue
        if not all(group.env[name] for name in wanted):
            yield f"{group.name}: variables of the fabric are empty"
        if any(group.env[k] != v for k, v in ROCE.items() if k in wanted):
            yield f"{group.name}: variables are not those of RoCE"
        if len({group.env[n] for n in wanted if n.endswith("_IFNAME")}) > 1:
            yield f"{group.name}: NCCL and gloo talk over different interfaces"
        added = group.container["securityContext"]["capabilities"].get("add", [])
        if (added == ["IPC_LOCK"]) is not (group.name in asks):
            yield f"{group.name}: has capabilities {added}"
        near = terms(group.pod.get("affinity", {}), "podAffinity")
        if bool(near) is not (group.name in asks):
            yield f"{group.name}: may be far from its peers: {near}"


def _limits(group: Group) -> dict[str, Any]:
    limits: dict[str, Any] = group.container["resources"]["limits"]
    return limits


def labels(m: Manifests) -> Iterator[str]:
    """Labels distinguish our objects from others."""
    pods = [(g.name, g.spec["template"]) for g in m.groups]
    pods += [("up", j["spec"]["template"]) for j in m.kind("Job")]
    named = [(f"{d['kind']}/{d['metadata']['name']}", d) for d in m.objects]
    for name, found in [*named, *pods]:
        if found.get("metadata", {}).get("labels", {}).get(PART_OF) != "expertmesh":
            yield f"{name}: is not labelled as a part of expertmesh"


def images(m: Manifests) -> Iterator[str]:
    """Pods run as the image's user, and pull as the overlay says."""
    text = (ROOT / "k8s" / "image" / "Dockerfile").read_text()
    user = re.search(r"^USER (\d+):(\d+)$", text, re.M)
    assert user is not None
    pods = [(g.name, g.pod) for g in m.groups]
    pods += [("up", j["spec"]["template"]["spec"]) for j in m.kind("Job")]
    pulls = set()
    for name, pod in pods:
        security = pod.get("securityContext", {})
        if (security.get("runAsUser"), security.get("runAsGroup")) != (int(user[1]), int(user[2])):
            yield f"{name}: runs as {security}, the image is made for {user[0]}"
        if name != "up" and security.get("fsGroup") != int(user[2]):
            yield f"{name}: volumes are not its own"
        (container,) = pod["containers"]
        pulls.add(container.get("imagePullPolicy"))
        wanted = {"headgroup": "ray-head", "up": "up"}.get(name, "ray-worker")
        if container.get("name") != wanted:
            yield f"{name}: its container is not {wanted}"
    if len(pulls) != 1 or not pulls <= {"IfNotPresent", "Never"}:
        yield f"images are pulled {pulls}"
    for account in m.kind("ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount/{account['metadata']['name']}: gives its token to pods"
