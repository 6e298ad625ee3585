"""Changes of the overlays that a check must see: ``(check, overlay, what, change)``."""

from __future__ import annotations

from tests.k8s.changes_wiring import CHANGES as WIRING
from tests.k8s.edits import (
    MULTI,
    Row,
    box,
    drop,
    labels_of,
    leave_to_defaults,
    near,
    pod,
    rename,
    set_engine,
    set_env,
    set_images,
    set_limit,
    set_port,
    set_version,
    spec,
    start_param,
    swap,
    unknown,
    up_words,
)

CHANGES: list[Row] = [
    *WIRING,
    # schemas
    ("schemas", MULTI, "a field nobody knows", lambda m: m.cluster["spec"].update(raysVersion="2")),
    ("schemas", MULTI, "a wrong type", lambda m: m.group("experts").spec.update(replicas="two")),
    ("schemas", MULTI, "no quantity", lambda m: set_limit(m, "experts", "memory", "512 Gi")),
    ("schemas", MULTI, "labels in parameters", lambda m: start_param(m, "labels", "a=b")),
    ("schemas", MULTI, "an unknown kind", lambda m: m.objects.append(unknown())),
    ("schemas", MULTI, "a name too long", lambda m: m.cluster["metadata"].update(name="x" * 60)),
    ("schemas", MULTI, "tokens before there were", lambda m: set_version(m, "2.51.0")),
    # selectors
    (
        "selectors",
        "cpu-kind",
        "a Service of all pods",
        lambda m: spec(m, "Service", "gateway")["selector"].pop("ray.io/group"),
    ),
    (
        "selectors",
        "cpu-kind",
        "a Service of none",
        lambda m: spec(m, "Service", "gateway-headless")["selector"].update(a="b"),
    ),
    (
        "selectors",
        "cpu-kind",
        "a PDB of another group",
        lambda m: labels_of(m, "PodDisruptionBudget", "experts").update({"ray.io/group": "expert"}),
    ),
    ("selectors", "cpu-kind", "a PDB less", lambda m: drop(m, "PodDisruptionBudget", "head")),
    (
        "selectors",
        MULTI,
        "a monitor of another cluster",
        lambda m: labels_of(m, "PodMonitor", "ray").update({"ray.io/cluster": "green"}),
    ),
    ("selectors", MULTI, "a group renamed", lambda m: rename(m, "gateway", "front")),
    # affinities
    ("affinities", MULTI, "experts anywhere", lambda m: pod(m, "experts").pop("affinity")),
    (
        "affinities",
        MULTI,
        "experts in different zones",
        lambda m: near(m, "experts").update(topologyKey="topology.kubernetes.io/zone"),
    ),
    (
        "affinities",
        MULTI,
        "apart from nobody",
        lambda m: near(m, "gateway")["labelSelector"]["matchLabels"].update(a="b"),
    ),
    (
        "affinities",
        MULTI,
        "near gateways",
        lambda m: pod(m, "attention")["affinity"]["podAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ][0]["labelSelector"].pop("matchExpressions"),
    ),
    # open ports
    ("open ports", "cpu-kind", "no policy", lambda m: drop(m, "NetworkPolicy", "cluster")),
    ("open ports", "cpu-kind", "no jobs", lambda m: drop(m, "NetworkPolicy", "jobs")),
    (
        "open ports",
        "cpu-kind",
        "the job API for all",
        lambda m: spec(m, "NetworkPolicy", "jobs")["ingress"][0].pop("from"),
    ),
    (
        "open ports",
        "cpu-kind",
        "the admin port",
        lambda m: spec(m, "NetworkPolicy", "gateway")["ingress"][0]["ports"].append({"port": 8001}),
    ),
    (
        "open ports",
        "cpu-kind",
        "public ports of all pods",
        lambda m: spec(m, "NetworkPolicy", "gateway")["podSelector"]["matchLabels"].pop(
            "ray.io/group"
        ),
    ),
    (
        "open ports",
        MULTI,
        "the Job's label changed",
        lambda m: spec(m, "Job", "up")["template"]["metadata"]["labels"].update(
            {"expertmesh/starts": "green"}
        ),
    ),
    # leaving
    (
        "leaving",
        "cpu-kind",
        "everything",
        lambda m: spec(m, "NetworkPolicy", "cluster")["egress"].append({}),
    ),
    (
        "leaving",
        "cpu-kind",
        "no policy for pods that leave",
        lambda m: spec(m, "NetworkPolicy", "cluster").update(policyTypes=["Ingress"]),
    ),
    ("leaving", "cpu-kind", "the Job's pod", lambda m: drop(m, "NetworkPolicy", "up")),
    ("leaving", MULTI, "no Redis", lambda m: drop(m, "NetworkPolicy", "redis")),
    (
        "leaving",
        MULTI,
        "another port of Redis",
        lambda m: m.cluster["spec"]["gcsFaultToleranceOptions"].update(redisAddress="r:6380"),
    ),
    # port numbers
    ("port numbers", "cpu-kind", "another gRPC port", lambda m: set_engine(m, grpc_port=50055)),
    (
        "port numbers",
        "cpu-kind",
        "a probe of another port",
        lambda m: box(m, "gateway")["readinessProbe"]["grpc"].update(port=50052),
    ),
    ("port numbers", "cpu-kind", "a container's", lambda m: set_port(m, "gateway", "grpc", 50052)),
    (
        "port numbers",
        "cpu-kind",
        "Ray's metrics",
        lambda m: set_port(m, "experts", "metrics", 9090),
    ),
    (
        "port numbers",
        "cpu-kind",
        "a Service's",
        lambda m: spec(m, "Service", "gateway")["ports"][1].update(port=443),
    ),
    (
        "port numbers",
        "cpu-kind",
        "a Service that leads elsewhere",
        lambda m: spec(m, "Service", "gateway")["ports"][0].update(targetPort="metrics"),
    ),
    (
        "port numbers",
        "cpu-kind",
        "gRPC over HTTP/1",
        lambda m: spec(m, "Service", "gateway")["ports"][1].update(appProtocol="http"),
    ),
    (
        "port numbers",
        "cpu-kind",
        "a headless Service with an address",
        lambda m: spec(m, "Service", "gateway-headless").pop("clusterIP"),
    ),
    (
        "port numbers",
        MULTI,
        "a route to HTTP for gRPC",
        lambda m: spec(m, "GRPCRoute", "grpc")["rules"][0]["backendRefs"][0].update(port=8000),
    ),
    (
        "port numbers",
        MULTI,
        "a monitor of no port",
        lambda m: spec(m, "PodMonitor", "gateway")["podMetricsEndpoints"][0].update(port="web"),
    ),
    (
        "port numbers",
        "cpu-kind",
        "a raylet's probe",
        lambda m: swap(box(m, "headgroup")["livenessProbe"]["exec"], "52365", "52366"),
    ),
    # disruption
    (
        "disruption",
        "cpu-kind",
        "a percentage",
        lambda m: spec(m, "PodDisruptionBudget", "experts").update(minAvailable="50%"),
    ),
    (
        "disruption",
        "cpu-kind",
        "maxUnavailable",
        lambda m: spec(m, "PodDisruptionBudget", "experts").update(maxUnavailable=1),
    ),
    (
        "disruption",
        "cpu-kind",
        "as many as there are",
        lambda m: spec(m, "PodDisruptionBudget", "gateway").update(minAvailable=2),
    ),
    ("disruption", "cpu-kind", "a pod more", lambda m: m.group("experts").spec.update(replicas=3)),
    (
        "disruption",
        "cpu-kind",
        "a head that may go",
        lambda m: spec(m, "PodDisruptionBudget", "head").update(minAvailable=0),
    ),
    # grace
    (
        "grace",
        MULTI,
        "too little",
        lambda m: pod(m, "experts").update(terminationGracePeriodSeconds=95),
    ),
    (
        "grace",
        MULTI,
        "the default",
        lambda m: leave_to_defaults(m, "headgroup"),
    ),
    ("grace", MULTI, "no drain", lambda m: box(m, "attention").pop("lifecycle")),
    (
        "grace",
        MULTI,
        "Ray's own drain",
        lambda m: set_env(m, "attention", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "30"),
    ),
    (
        "grace",
        MULTI,
        "a longer drain",
        lambda m: swap(box(m, "experts")["lifecycle"]["preStop"]["exec"], "90", "120"),
    ),
    (
        "grace",
        MULTI,
        "a gateway that goes at once",
        lambda m: box(m, "gateway").pop("lifecycle"),
    ),
    (
        "grace",
        MULTI,
        "a gateway that drains its node's workers",
        lambda m: swap(
            box(m, "gateway")["lifecycle"]["preStop"]["exec"], "drain gateway", "drain node x"
        ),
    ),
    (
        "grace",
        MULTI,
        "another admin port",
        lambda m: swap(box(m, "gateway")["lifecycle"]["preStop"]["exec"], "8001", "8002"),
    ),
    # tolerations
    (
        "tolerations",
        MULTI,
        "five minutes",
        lambda m: pod(m, "gateway")["tolerations"][0].update(tolerationSeconds=300),
    ),
    ("tolerations", MULTI, "no GPU nodes", lambda m: pod(m, "experts")["tolerations"].pop()),
    # probes
    ("probes", "cpu-kind", "no startup", lambda m: box(m, "experts").pop("startupProbe")),
    (
        "probes",
        "cpu-kind",
        "liveness by the model",
        lambda m: box(m, "experts").update(livenessProbe=box(m, "experts")["readinessProbe"]),
    ),
    (
        "probes",
        "cpu-kind",
        "readiness by Ray",
        lambda m: box(m, "attention").update(readinessProbe=box(m, "attention")["livenessProbe"]),
    ),
    (
        "probes",
        "cpu-kind",
        "ten minutes",
        lambda m: box(m, "headgroup")["livenessProbe"].update(failureThreshold=60),
    ),
    # commands
    ("commands", MULTI, "a word too many", lambda m: up_words(m).append("--at-once")),
    ("commands", MULTI, "no up", lambda m: up_words(m).__setitem__(7, "down")),
    ("commands", MULTI, "another file", lambda m: up_words(m).__setitem__(-1, "/etc/engine.yaml")),
    (
        "commands",
        MULTI,
        "another Service",
        lambda m: up_words(m).__setitem__(4, "http://head:8265"),
    ),
    (
        "commands",
        MULTI,
        "a probe that is no command",
        lambda m: swap(box(m, "experts")["readinessProbe"]["exec"], "--node", "--nodename"),
    ),
    (
        "commands",
        MULTI,
        "a hook that is no command",
        lambda m: swap(box(m, "experts")["lifecycle"]["preStop"]["exec"], "--deadline", "--limit"),
    ),
    ("commands", MULTI, "a model elsewhere", lambda m: set_engine(m, model="/data/dots.llm1.inst")),
    ("commands", MULTI, "no keys at gateways", lambda m: box(m, "gateway")["volumeMounts"].pop(1)),
    # options
    ("options", MULTI, "a flag nobody knows", lambda m: set_engine(m, num_workers=3)),
    # mounts
    ("mounts", "cpu-kind", "a volume less", lambda m: pod(m, "experts")["volumes"].pop(0)),
    (
        "mounts",
        "cpu-kind",
        "another ConfigMap",
        lambda m: pod(m, "headgroup")["volumes"][2]["configMap"].update(name="engine"),
    ),
    (
        "mounts",
        "cpu-kind",
        "no account",
        lambda m: pod(m, "gateway").update(serviceAccountName="default"),
    ),
    (
        "mounts",
        "cpu-kind",
        "a large object store",
        lambda m: start_param(m, "object-store-memory", str(1 << 32)),
    ),
    # privileges
    (
        "privileges",
        MULTI,
        "root",
        lambda m: pod(m, "experts")["securityContext"].pop("runAsNonRoot"),
    ),
    (
        "privileges",
        MULTI,
        "a privileged container",
        lambda m: box(m, "experts")["securityContext"].update(privileged=True),
    ),
    (
        "privileges",
        MULTI,
        "a capability",
        lambda m: box(m, "experts")["securityContext"]["capabilities"]["add"].append("SYS_ADMIN"),
    ),
    (
        "privileges",
        MULTI,
        "a token",
        lambda m: spec(m, "Job", "up")["template"]["spec"].pop("automountServiceAccountToken"),
    ),
    (
        "privileges",
        MULTI,
        "any system call",
        lambda m: pod(m, "headgroup")["securityContext"].pop("seccompProfile"),
    ),
    (
        "privileges",
        MULTI,
        "files of the image that may be written",
        lambda m: box(m, "gateway")["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    (
        "privileges",
        "cpu-kind",
        "no place for files",
        lambda m: spec(m, "Job", "up")["template"]["spec"]["containers"][0]["volumeMounts"].clear(),
    ),
    # shape
    (
        "shape",
        MULTI,
        "work on the head",
        lambda m: m.group("headgroup").spec["rayStartParams"].pop("num-cpus"),
    ),
    (
        "shape",
        MULTI,
        "a GPU for the head",
        lambda m: set_limit(m, "headgroup", "nvidia.com/gpu", "1"),
    ),
    (
        "shape",
        MULTI,
        "replicas of two hosts",
        lambda m: m.group("experts").spec.update(numOfHosts=2),
    ),
    ("shape", MULTI, "no pod more", lambda m: m.group("experts").spec.update(maxReplicas=2)),
    ("shape", MULTI, "no pod less", lambda m: m.group("experts").spec.update(minReplicas=2)),
    ("shape", MULTI, "a gateway more", lambda m: m.group("gateway").spec.update(maxReplicas=3)),
    ("shape", MULTI, "nodes not followed", lambda m: set_engine(m, follow_nodes=False)),
    (
        "shape",
        MULTI,
        "labels exchanged",
        lambda m: m.group("experts").spec["labels"].update({"expertmesh/role": "attention"}),
    ),
    (
        "shape",
        MULTI,
        "recreation",
        lambda m: m.cluster["spec"].update(upgradeStrategy={"type": "Recreate"}),
    ),
    (
        "shape",
        MULTI,
        "a Job without retry",
        lambda m: spec(m, "Job", "up")["template"]["spec"].update(restartPolicy="Never"),
    ),
    ("shape", MULTI, "one gateway", lambda m: m.group("gateway").spec.update(replicas=1)),
    ("shape", MULTI, "a group less", lambda m: m.cluster["spec"]["workerGroupSpecs"].pop()),
    # versions
    ("versions", MULTI, "another Ray", lambda m: set_version(m, "2.59.0")),
    (
        "versions",
        MULTI,
        "two images",
        lambda m: box(m, "gateway").update(image="expertmesh:0.2.0-ray2.60.0-x"),
    ),
    ("versions", MULTI, "latest", lambda m: set_images(m, "r/expertmesh:latest")),
    (
        "versions",
        MULTI,
        "an image of another Ray",
        lambda m: set_images(m, "r/expertmesh:0.2.0-ray2.59.0-cuda"),
    ),
    # secrets
    ("secrets", MULTI, "a key in engine.yaml", lambda m: set_engine(m, api_key="k")),
    ("secrets", MULTI, "no keys", lambda m: set_engine(m, api_key_file=None)),
    ("secrets", MULTI, "a token in clear", lambda m: set_env(m, "gateway", "RAY_AUTH_TOKEN", "t")),
    (
        "secrets",
        MULTI,
        "a password in clear",
        lambda m: m.cluster["spec"]["gcsFaultToleranceOptions"].update(
            redisPassword={"value": "p"}
        ),
    ),
    (
        "secrets",
        MULTI,
        "a Secret",
        lambda m: m.objects.append(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}
        ),
    ),
    ("secrets", MULTI, "Ray without a token", lambda m: m.cluster["spec"].pop("authOptions")),
    # devices
    ("devices", MULTI, "a GPU less", lambda m: set_limit(m, "experts", "nvidia.com/gpu", "7")),
    ("devices", MULTI, "a GPU more", lambda m: set_limit(m, "attention", "nvidia.com/gpu", "9")),
    (
        "devices",
        "gpu-single-node",
        "pods that share a host",
        lambda m: set_limit(m, "attention", "nvidia.com/gpu", "6"),
    ),
    (
        "devices",
        "gpu-single-node",
        "experts elsewhere",
        lambda m: m.group("experts").spec.update(replicas=1),
    ),
    (
        "shape",
        "gpu-single-node",
        "a node of one pool",
        lambda m: m.group("attention").spec.update(labels={"expertmesh/role": "attention"}),
    ),
    ("devices", MULTI, "too many workers", lambda m: set_engine(m, num_expert_workers=17)),
    ("devices", MULTI, "too many CPUs", lambda m: set_engine(m, cpus_per_worker=9)),
    ("devices", "cpu-kind", "a gateway more", lambda m: set_engine(m, num_gateway_replicas=3)),
    ("devices", "cpu-kind", "a pod less to wait for", lambda m: set_engine(m, wait_nodes=5)),
    # memory
    ("memory", MULTI, "a GPU too full", lambda m: set_engine(m, kv_cache_bytes="60G")),
    ("memory", MULTI, "a pod too small", lambda m: set_limit(m, "experts", "memory", "256Gi")),
    ("memory", "cpu-kind", "a KV too large", lambda m: set_engine(m, kv_cache_bytes="1G")),
    (
        "memory",
        MULTI,
        "no time to load",
        lambda m: box(m, "experts")["startupProbe"].update(failureThreshold=60),
    ),
    # guide
    ("guide", "gpu-single-node", "other pools", lambda m: set_engine(m, num_attention_workers=5)),
    ("guide", MULTI, "other spare slots", lambda m: set_engine(m, num_redundant_experts=7)),
    ("guide", MULTI, "a small head", lambda m: set_limit(m, "headgroup", "memory", "4Gi")),
    # copies
    ("copies", MULTI, "too few slots", lambda m: set_engine(m, num_redundant_experts=4)),
]
