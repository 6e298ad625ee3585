"""What is in the pods: disruption, probes, commands, mounts, privileges.

A check yields what is wrong in a rendered overlay, nothing if all is well.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from cluster.cli.main import make_parser
from cluster.cli.serve_options import OPTIONS
from tests.k8s.checks_network import DASHBOARD_PORT, WORKERS
from tests.k8s.kuberay import GROUPS, Group, Manifests, quantity

ROLES = {"gateway": "gateway", "attention": "attention", "experts": "expert"}
"""Group -> what its nodes are labelled for."""
LEAD_S = 30.0
"""Endpoints and proxies know by then that a pod goes."""


def budgets(m: Manifests) -> Iterator[str]:
    """PDBs have an integer minAvailable: one pod of a group may go, the head may not."""
    for budget in m.kind("PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        at_least = spec.get("minAvailable")
        if "maxUnavailable" in spec or not isinstance(at_least, int):
            yield f"{name}: an eviction would be refused for ever, minAvailable is {at_least!r}"
            continue
        for group in map(m.group, m.selected(spec["selector"]) & set(GROUPS)):
            wanted = 1 if group.name == "headgroup" else group.replicas - 1
            if at_least != wanted:
                yield f"{name}: minAvailable is {at_least} of {group.replicas}, not {wanted}"


def grace(m: Manifests) -> Iterator[str]:
    """A pod has time for its drain and for Ray's own, and more than that."""
    for group in m.groups:
        ray_s = float(group.env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
        total = group.pod.get("terminationGracePeriodSeconds", 30)
        words = _hook(group)
        drain_s = 0.0
        if group.name in WORKERS and words[:2] != ["expertmesh", "drain"]:
            yield f"{group.name}: does not drain before it stops"
        elif group.name in WORKERS:
            drain_s = make_parser().parse_args(words[1:]).timeout or 120.0
        elif group.name == "gateway":
            if words[:1] != ["sleep"] or float(words[1]) < LEAD_S:
                yield "gateway: stops before others know that it goes"
            else:
                drain_s = float(words[1])
        if total <= drain_s + ray_s:
            yield f"{group.name}: {total} s of grace for {drain_s:g} s of drain and {ray_s:g} s"


def _hook(group: Group) -> list[str]:
    command = group.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
    return shlex.split(command[-1]) if command else []


def tolerations(m: Manifests) -> Iterator[str]:
    """A pod leaves a lost node after half a minute; GPU pods may be on GPU nodes."""
    for group in m.groups:
        given = {t["key"]: t for t in group.pod.get("tolerations", [])}
        for reason in ("not-ready", "unreachable"):
            limit = given.get(f"node.kubernetes.io/{reason}", {}).get("tolerationSeconds")
            if limit != 30:
                yield f"{group.name}: stays {limit} s on a node that is {reason}"
        if group.limit("nvidia.com/gpu") and "nvidia.com/gpu" not in given:
            yield f"{group.name}: GPU nodes turn it away"


def probes(m: Manifests) -> Iterator[str]:
    """Readiness asks for the model, liveness only for Ray: one rank's fault restarts no other."""
    for group in m.groups:
        container = group.container
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            if name not in container:
                yield f"{group.name}: leaves its {name} to the operator"
        if "local_raylet_healthz" not in str(container.get("livenessProbe")):
            yield f"{group.name}: liveness does not ask the raylet"
        if "expertmesh" in str(container.get("livenessProbe")):
            yield f"{group.name}: liveness depends on the model"
        alive = container.get("livenessProbe", {})
        if alive.get("periodSeconds", 10) * alive.get("failureThreshold", 3) != 60:
            yield f"{group.name}: a frozen raylet is not restarted after a minute"
        asks = "expertmesh health" in str(container.get("readinessProbe"))
        if asks != (group.name in WORKERS):
            yield f"{group.name}: readiness does not mean what it should"


def commands(m: Manifests) -> Iterator[str]:
    """Commands in pods are commands of this product, and refer to files that are mounted."""
    for job in m.kind("Job"):
        words = job["spec"]["template"]["spec"]["containers"][0]["command"]
        submit, own = words[: words.index("--")], words[words.index("--") + 1 :]
        if submit[:3] != ["ray", "job", "submit"] or own[:2] != ["expertmesh", "up"]:
            yield f"Job: does not start the cluster: {words}"
            continue
        if f"$(CLUSTER)-head-svc:{DASHBOARD_PORT}" not in submit[-1]:
            yield "Job: is not sent to the head's Service"
        yield from _parses("Job", own)
        config = own[own.index("--config") + 1] if "--config" in own else ""
        if not _is_mounted(m.group("headgroup"), config):
            yield f"Job: the head has no {config}"
    for group in m.groups:
        for text in _all_commands(group):
            if text.startswith("expertmesh"):
                yield from _parses(group.name, shlex.split(text))
    for name in ("model", "api-key-file"):
        path = str(m.engine.get(name, ""))
        holders = m.groups if name == "model" else m.groups[:2]
        for group in holders if path else []:
            if not _is_mounted(group, path):
                yield f"engine.yaml: {name} {path} is not mounted in {group.name}"


def _all_commands(group: Group) -> list[str]:
    container = group.container
    handlers = [container.get(n, {}) for n in ("startupProbe", "readinessProbe", "livenessProbe")]
    handlers.append(container.get("lifecycle", {}).get("preStop", {}))
    return [word for h in handlers for word in h.get("exec", {}).get("command", [])]


def _parses(where: str, words: list[str]) -> Iterator[str]:
    try:
        make_parser().parse_args(words[1:])
    except SystemExit:
        yield f"{where}: is no command: {' '.join(words)}"


def _is_mounted(group: Group, path: str) -> bool:
    return any(path.startswith(f"{v['mountPath']}/") for v in group.container["volumeMounts"])


def mounts(m: Manifests) -> Iterator[str]:
    """Every mount has its volume, every ConfigMap and ServiceAccount is there."""
    objects = {(d["kind"], d["metadata"]["name"]) for d in m.objects}
    for group in m.groups:
        volumes = {v["name"]: v for v in group.pod["volumes"]}
        for mount in group.container["volumeMounts"]:
            if mount["name"] not in volumes:
                yield f"{group.name}: mounts {mount['name']}, which is no volume"
        for volume in volumes.values():
            name = volume.get("configMap", {}).get("name")
            if name and ("ConfigMap", name) not in objects:
                yield f"{group.name}: there is no ConfigMap {name}"
        if ("ServiceAccount", group.pod.get("serviceAccountName")) not in objects:
            yield f"{group.name}: has no account of its own"
        stores = float(group.spec["rayStartParams"]["object-store-memory"])
        room = quantity(volumes["shm"]["emptyDir"]["sizeLimit"])
        if not stores < room:
            yield f"{group.name}: an object store of {stores:g} bytes in {room:g} of /dev/shm"


def confined(m: Manifests) -> Iterator[str]:
    """No root, no privileges but locked memory for RDMA, no token of a service account."""
    pods = [(g.name, g.pod) for g in m.groups]
    pods += [("up", j["spec"]["template"]["spec"]) for j in m.kind("Job")]
    for name, pod in pods:
        security = pod.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
            yield f"{name}: may run as root"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name}: any system call"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{name}: has a service account's token"
        for container in pod["containers"]:
            own = container.get("securityContext", {})
            capabilities = own.get("capabilities", {})
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{name}: may become root"
            if capabilities.get("drop") != ["ALL"]:
                yield f"{name}: keeps capabilities"
            if not set(capabilities.get("add", [])) <= {"IPC_LOCK"} or own.get("privileged"):
                yield f"{name}: has capabilities {capabilities.get('add')}"


def shape(m: Manifests) -> Iterator[str]:
    """Head, gateway, attention, experts; one host a replica, fixed sizes, labels that say who."""
    spec = m.cluster["spec"]
    if tuple(g.name for g in m.groups) != GROUPS:
        yield f"groups are {[g.name for g in m.groups]}"
    if spec.get("enableInTreeAutoscaling") or spec.get("upgradeStrategy") != {"type": "None"}:
        yield "the operator may delete pods by itself"
    head = m.group("headgroup")
    if head.start_params()["num-cpus"] != "0" or head.limit("nvidia.com/gpu"):
        yield "headgroup: work may land there"
    if head.labels:
        yield "headgroup: is labelled for work"
    for group in m.groups[1:]:
        if group.spec.get("numOfHosts") != 1:
            yield f"{group.name}: a lost host would take others along"
        sizes = {group.spec.get(k) for k in ("replicas", "minReplicas", "maxReplicas")}
        if len(sizes) != 1:
            yield f"{group.name}: its size is not fixed: {sizes}"
        if group.labels.get("expertmesh/role") != ROLES[group.name]:
            yield f"{group.name}: is labelled for {group.labels}"
        if group.container["resources"]["limits"] != group.container["resources"]["requests"]:
            yield f"{group.name}: requests are not limits"
    job = m.kind("Job")
    if len(job) != 1 or job[0]["spec"]["template"]["spec"]["restartPolicy"] != "OnFailure":
        yield "the Job does not try again"


def options(m: Manifests) -> Iterator[str]:
    """Options in engine.yaml are options of ``up``."""
    known = {option.flag.removeprefix("--") for option in OPTIONS} | {"model"}
    yield from (f"engine.yaml: {key} is no option" for key in m.engine if key not in known)
