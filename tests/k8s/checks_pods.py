"""What is in the pods: disruption, probes, commands, mounts, privileges.

A check yields what is wrong in a rendered overlay, nothing if all is well.
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from typing import Any

from cluster.cli import main
from cluster.cli.cluster.drain import DEFAULT_LIMIT_S
from cluster.cli.options.serve_options import OPTIONS
from gateway.admin.service import HTTP_PORT as ADMIN_PORT
from tests.k8s.checks_network import DASHBOARD_PORT, WORKERS
from tests.k8s.kuberay import GROUPS, Group, Manifests, quantity

ROLES = {"gateway": "gateway", "attention": "attention", "experts": "expert"}
"""Group -> what its nodes are labelled for."""
ENGINE_FILE = "/etc/expertmesh/engine/engine.yaml"
_ACTS_AFTER_S = {"startupProbe": (300, 1800), "readinessProbe": (10, 60), "livenessProbe": (60, 60)}
"""Between the first miss and what follows from it; a frozen raylet is restarted after a minute."""
_HEALTH_OF_RAY = (
    "http://localhost:52365/api/local_raylet_healthz",
    "http://$POD_IP:8265/api/gcs_healthz",
)
"""Of every node, and of the head."""
_ASKS_RAY = re.compile(r"wget --tries 1 -T (\d+) -q -O- (\S+) \| grep success")
make_parser = functools.cache(main.make_parser)


def budgets(m: Manifests) -> Iterator[str]:
    """PDBs have an integer minAvailable: one pod of a group may go, the head may not."""
    for budget in m.kind("PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        at_least = spec.get("minAvailable")
        if "maxUnavailable" in spec or not isinstance(at_least, int):
            yield f"{name}: an eviction would be refused for ever, minAvailable is {at_least!r}"
            continue
        for group in map(m.group, m.selected(spec["selector"]) & set(GROUPS)):
            wanted = 1 if group.name == "headgroup" else max(group.replicas - 1, 0)
            if at_least != wanted:
                yield f"{name}: minAvailable is {at_least} of {group.replicas}, not {wanted}"


def grace(m: Manifests) -> Iterator[str]:
    """A pod has time for its drain and for Ray's own, and more than that."""
    for group in m.groups:
        ray_s = float(group.env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
        total = group.pod.get("terminationGracePeriodSeconds", 30)
        words = _hook(group)
        drain_s = 0.0
        if group.name != "headgroup":
            if words[:2] != ["expertmesh", "drain"]:
                yield f"{group.name}: does not drain before it stops"
            given = dict(itertools.pairwise(words))
            whom = ("gateway",) if group.name == "gateway" else ("node", "$POD_IP")
            limit = "--wait" if group.name == "gateway" else "--deadline"
            drain_s = float(given.get(limit, DEFAULT_LIMIT_S))
            if words[2 : 2 + len(whom)] != [*whom]:
                yield f"{group.name}: drains something else"
            admin_url = f"http://127.0.0.1:{m.engine.get('admin-port', ADMIN_PORT)}"
            if group.name == "gateway" and given.get("--admin-url") != admin_url:
                yield f"{group.name}: no gateway listens at {given.get('--admin-url')}"
        if "terminationGracePeriodSeconds" not in group.pod:
            yield f"{group.name}: has as much time as any pod"
        if not drain_s + ray_s < total <= 600:
            yield f"{group.name}: {total} s of grace for {drain_s:g} s of drain and {ray_s:g} s"


def _hook(group: Group) -> list[str]:
    return shlex.split(_script(group.container.get("lifecycle", {}).get("preStop", {})))


def tolerations(m: Manifests) -> Iterator[str]:
    """A pod leaves a lost node after half a minute; GPU pods may be on GPU nodes."""
    for group in m.groups:
        given = {t["key"]: t for t in group.pod.get("tolerations", [])}
        for reason in ("not-ready", "unreachable"):
            found = given.get(f"node.kubernetes.io/{reason}", {})
            if _kind(found) != ("Exists", "NoExecute") or found.get("tolerationSeconds") != 30:
                yield f"{group.name}: a node that is {reason} is left after {found}"
        if group.limit("nvidia.com/gpu"):
            if _kind(given.get("nvidia.com/gpu", {})) != ("Exists", "NoSchedule"):
                yield f"{group.name}: GPU nodes turn it away"
            if not group.pod.get("runtimeClassName"):
                yield f"{group.name}: has GPUs and no runtime for them"


def _kind(toleration: dict[str, Any]) -> tuple[Any, Any]:
    return toleration.get("operator"), toleration.get("effect")


def probes(m: Manifests) -> Iterator[str]:
    """Readiness asks for the model, liveness only for Ray: one rank's fault restarts no other."""
    for group in m.groups:
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = group.container.get(name)
            if probe is None:
                yield f"{group.name}: leaves its {name} to the operator"
                continue
            yield from (f"{group.name}: {name} {x}" for x in _probe(group, name, probe))


def _probe(group: Group, name: str, probe: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one probe."""
    numbers = ("periodSeconds", "failureThreshold", "timeoutSeconds")
    if missing := set(numbers) - probe.keys():
        yield f"leaves {sorted(missing)} to defaults"
    every_s, misses = probe.get("periodSeconds", 10), probe.get("failureThreshold", 3)
    limit_s = probe.get("timeoutSeconds", 1)
    low, high = _ACTS_AFTER_S[name]
    if not low <= every_s * misses <= high:
        yield f"acts after {every_s * misses} s"
    if name == "readinessProbe" and group.name == "gateway":
        if set(probe) & {"exec", "httpGet", "tcpSocket"} or "grpc" not in probe:
            yield "does not ask for gRPC's health"
    elif name == "readinessProbe" and group.name in WORKERS:
        if _script(probe) != 'expertmesh health --node "$POD_IP"':
            yield "does not ask whether the node's workers serve"
    else:
        asks = [_ASKS_RAY.fullmatch(part) for part in _script(probe).split(" && ")]
        asked = [(found[1], found[2]) for found in asks if found]
        number = 2 if group.name == "headgroup" else 1
        if [url for _, url in asked] != list(_HEALTH_OF_RAY[:number]):
            yield f"asks {_script(probe)}"
        if sum(int(seconds) for seconds, _ in asked) > limit_s:
            yield f"gives up after {limit_s} s, before its command does"
    if not 5 <= limit_s <= 15:
        yield f"waits {limit_s} s for an answer, on a busy machine too"


def _script(handler: dict[str, Any]) -> str:
    """The script of a probe or hook, nothing if it is none."""
    words = handler.get("exec", {}).get("command", [])
    return str(words[2]) if words[:2] == ["bash", "-c"] and len(words) == 3 else ""


def commands(m: Manifests) -> Iterator[str]:
    """Commands in pods are commands of this product, and refer to files that are mounted."""
    for job in m.kind("Job"):
        words = job["spec"]["template"]["spec"]["containers"][0]["command"]
        submit, own = words[: words.index("--")], words[words.index("--") + 1 :]
        if submit[:3] != ["ray", "job", "submit"] or own[:2] != ["expertmesh", "up"]:
            yield f"Job: does not start the cluster: {words}"
            continue
        if submit[3:] != ["--address", f"http://$(CLUSTER)-head-svc:{DASHBOARD_PORT}"]:
            yield "Job: is not sent to the head's Service"
        if own[2:] != ["--address", "auto", "--config", ENGINE_FILE]:
            yield f"Job: does not start what engine.yaml says: {own}"
        yield from _parses("Job", own)
        if not _is_mounted(m.group("headgroup"), ENGINE_FILE):
            yield f"Job: the head has no {ENGINE_FILE}"
    for group in m.groups:
        for text in _all_commands(group):
            if text.startswith("expertmesh"):
                yield from _parses(group.name, shlex.split(text))
    for name in ("model", "api-key-file", "admin-key-file"):
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
            if volume["name"] == "engine" and ("ConfigMap", name) not in objects:
                yield f"{group.name}: there is no ConfigMap {name}"
        if ("ServiceAccount", group.pod.get("serviceAccountName")) not in objects:
            yield f"{group.name}: has no account of its own"
        paths = {v["mountPath"]: v["name"] for v in group.container["volumeMounts"]}
        if (paths.get("/dev/shm"), paths.get("/tmp/ray")) != ("shm", "ray"):
            yield f"{group.name}: shared memory and Ray's files are the operator's, or the disk's"
            continue
        shm, ray = (volumes.get(name, {}).get("emptyDir", {}) for name in ("shm", "ray"))
        stores = float(group.spec["rayStartParams"]["object-store-memory"])
        room = quantity(shm.get("sizeLimit", 0))
        if shm.get("medium") != "Memory" or not stores < room < group.limit("memory"):
            yield f"{group.name}: an object store of {stores:g} bytes in {shm}"
        if not 1e9 < quantity(ray.get("sizeLimit", 0)) < 1e11:
            yield f"{group.name}: Ray's files may take {ray}"
        weights = volumes.get("weights", {})
        claim = weights.get("persistentVolumeClaim", {})
        if "model" in m.engine and not (claim.get("claimName") and claim.get("readOnly") is True):
            yield f"{group.name}: weights come from {weights}"
    claims = {str(v) for g in m.groups for v in g.pod["volumes"] if v.get("name") == "weights"}
    if len(claims) != 1:
        yield f"weights come from {claims}"


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
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{name}: may write to the image's files"
            if problem := _scratch(pod, container):
                yield f"{name}: {problem}"
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{name}: may become root"
            if capabilities.get("drop") != ["ALL"]:
                yield f"{name}: keeps capabilities"
            if not set(capabilities.get("add", [])) <= {"IPC_LOCK"} or own.get("privileged"):
                yield f"{name}: has capabilities {capabilities.get('add')}"


def _scratch(pod: dict[str, Any], container: dict[str, Any]) -> str:
    """Why programs find no place for their files; the root of the file system is read only."""
    (mount,) = [v for v in container["volumeMounts"] if v["mountPath"] == "/tmp"] or [{}]
    volumes = {v["name"]: v for v in pod["volumes"]}
    room = volumes.get(mount.get("name"), {}).get("emptyDir", {}).get("sizeLimit", 0)
    if mount.get("readOnly") or not 1e9 < quantity(room) < 1e10:
        return f"programs write to {mount}, of {room}"
    home = [e.get("value") for e in container["env"] if e["name"] == "HOME"]
    return "" if home == ["/tmp"] else f"the user's folder is {home}"


def shape(m: Manifests) -> Iterator[str]:
    """Head, gateway, attention, experts; one host a replica, sizes, labels that say who."""
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
    if m.group("gateway").replicas < 2:
        yield "gateway: a single pod, without which there is no service"
    has_experts = any(group.name == "experts" and group.replicas for group in m.groups)
    for group in m.groups[1:]:
        if group.spec.get("numOfHosts") != 1:
            yield f"{group.name}: a lost host would take others along"
        yield from _size(group, m.engine.get("follow-nodes") is True and group.name != "gateway")
        has_both = group.name == "attention" and not has_experts
        if group.labels.get("expertmesh/role") != (None if has_both else ROLES[group.name]):
            yield f"{group.name}: is labelled for {group.labels}"
    for group in m.groups:
        if group.container["resources"]["limits"] != group.container["resources"].get("requests"):
            yield f"{group.name}: requests are not limits"
    job = m.kind("Job")
    if len(job) != 1 or job[0]["spec"]["template"]["spec"]["restartPolicy"] != "OnFailure":
        yield "the Job does not try again"


def _size(group: Group, is_followed: bool) -> Iterator[str]:
    """Where the cluster follows its nodes a group may be scaled, else its size is fixed."""
    low, size, high = (group.spec[f"{k}eplicas"] for k in ("minR", "r", "maxR"))
    if is_followed and not 1 == low <= size < high:
        yield f"{group.name}: {size} of {low} to {high} pods, which is no room to scale"
    if not is_followed and not low == size == high:
        yield f"{group.name}: its size is not fixed: {low} to {high}"


def options(m: Manifests) -> Iterator[str]:
    """Options in engine.yaml are options of ``up``."""
    known = {option.flag.removeprefix("--") for option in OPTIONS} | {"model"}
    yield from (f"engine.yaml: {key} is no option" for key in m.engine if key not in known)
