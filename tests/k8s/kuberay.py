"""A rendered overlay, and the pods that the KubeRay operator (v1.7) creates from it.

``pods()`` has a pod for each replica with the labels that selectors see; ``start_command`` is the
``ray start`` that the operator writes into its container.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.paths import ROOT

K8S = ROOT / "k8s"
OVERLAYS = ("cpu-kind", "gpu-single-node", "gpu-multi-node")
GROUPS = ("headgroup", "gateway", "attention", "experts")
METRICS_PORT = 8080
AGENT_PORT = 52365
PART_OF = "app.kubernetes.io/part-of"
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class NoKubectl(Exception):
    """Manifests cannot be rendered on this machine."""


@functools.cache
def render(overlay: str, root: Path = K8S) -> str:
    """What ``kubectl apply -k`` would send, of ``k8s/`` or a copy. Raises ``NoKubectl``."""
    if shutil.which("kubectl") is None:
        raise NoKubectl("kubectl, whose kustomize renders the overlays, is not installed")
    command = ["kubectl", "kustomize", str(root / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _parsed(overlay: str, root: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.load_all(render(overlay, root), yaml.CSafeLoader) if d is not None]


@functools.cache
def _options(text: str) -> Mapping[str, Any]:
    options: dict[str, Any] = yaml.load(text, yaml.CSafeLoader)
    return options


def quantity(text: object) -> float:
    """A number of Kubernetes, in cores or bytes: ``quantity("1536Mi")`` is 1610612736."""
    found = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text))
    assert found is not None, text
    return float(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True, slots=True)
class Group:
    """The head group or a worker group of a RayCluster."""

    spec: dict[str, Any]
    """As in the manifest."""

    @property
    def name(self) -> str:
        """``ray.io/group``."""
        return str(self.spec.get("groupName", "headgroup"))

    @property
    def replicas(self) -> int:
        """Pods."""
        return int(self.spec.get("replicas", 1))

    @property
    def pod(self) -> dict[str, Any]:
        """Pod spec."""
        pod: dict[str, Any] = self.spec["template"]["spec"]
        return pod

    @property
    def container(self) -> dict[str, Any]:
        """Ray's container, the first one."""
        container: dict[str, Any] = self.pod["containers"][0]
        return container

    @property
    def env(self) -> dict[str, str]:
        """Plain variables."""
        return {e["name"]: e["value"] for e in self.container.get("env", []) if "value" in e}

    @property
    def ports(self) -> dict[str, int]:
        """Container ports by name."""
        return {p["name"]: p["containerPort"] for p in self.container.get("ports", [])}

    def limit(self, resource: str) -> float:
        """A limit of the container, 0 without."""
        return quantity(self.container["resources"]["limits"].get(resource, 0))

    @property
    def labels(self) -> dict[str, str]:
        """Ray node labels, on the pods too."""
        return dict(self.spec.get("labels", {}))

    def start_params(self) -> dict[str, str]:
        """Parameters of ``ray start``: the given ones, and those that follow from the limits."""
        params = {
            "block": "true",
            "dashboard-agent-listen-port": str(AGENT_PORT),
            "metrics-export-port": str(METRICS_PORT),
            "memory": str(int(self.limit("memory"))),
            "num-cpus": str(math.ceil(self.limit("cpu"))),
        }
        if self.limit("nvidia.com/gpu"):
            params["num-gpus"] = str(int(self.limit("nvidia.com/gpu")))
        if self.labels:
            params["labels"] = ",".join(f"{k}={v}" for k, v in sorted(self.labels.items()))
        given: dict[str, str] = self.spec.get("rayStartParams", {})
        return params | given


@dataclass(frozen=True, slots=True)
class Manifests:
    """The objects of one rendered overlay."""

    objects: list[dict[str, Any]]
    """As rendered."""

    @classmethod
    def of(cls, overlay: str, root: Path = K8S) -> Manifests:
        """A fresh copy of an overlay's objects. Raises ``NoKubectl``."""
        return cls(copy.deepcopy(_parsed(overlay, root)))

    def kind(self, kind: str) -> list[dict[str, Any]]:
        """All objects of a kind."""
        return [d for d in self.objects if d["kind"] == kind]

    def named(self, kind: str, name: str) -> dict[str, Any]:
        """The object of that kind and name."""
        (found,) = [d for d in self.kind(kind) if d["metadata"]["name"] == name]
        return found

    @property
    def cluster(self) -> dict[str, Any]:
        """The RayCluster."""
        (found,) = self.kind("RayCluster")
        return found

    @property
    def name(self) -> str:
        """Of the RayCluster."""
        return str(self.cluster["metadata"]["name"])

    @property
    def groups(self) -> list[Group]:
        """The head, then the worker groups."""
        spec = self.cluster["spec"]
        return [Group(spec["headGroupSpec"]), *map(Group, spec["workerGroupSpecs"])]

    def group(self, name: str) -> Group:
        """A group by name."""
        (found,) = [g for g in self.groups if g.name == name]
        return found

    def pool(self, name: str) -> Group:
        """The group whose pods hold a pool: that of attention where experts have no pods."""
        group = self.group(name)
        return group if group.replicas else self.group("attention")

    @property
    def engine_text(self) -> str:
        """engine.yaml."""
        (found,) = [d for d in self.kind("ConfigMap") if "engine.yaml" in d["data"]]
        return str(found["data"]["engine.yaml"])

    @property
    def engine(self) -> dict[str, Any]:
        """Options of ``up`` by flag name."""
        return dict(_options(self.engine_text))

    def pod_labels(self) -> dict[str, dict[str, str]]:
        """Labels of the pods of each group, and of the pod of the Job (``up``)."""
        found, cluster = {}, self.name
        for group in self.groups:
            is_head = group.name == "headgroup"
            found[group.name] = {
                **group.spec["template"].get("metadata", {}).get("labels", {}),
                **group.labels,
                "app.kubernetes.io/created-by": "kuberay-operator",
                "app.kubernetes.io/name": "kuberay",
                "ray.io/cluster": cluster,
                "ray.io/group": group.name,
                "ray.io/is-ray-node": "yes",
                "ray.io/node-type": "head" if is_head else "worker",
            }
        for job in self.kind("Job"):
            labels = job["spec"]["template"]["metadata"]["labels"]
            found["up"] = {**labels, "batch.kubernetes.io/job-name": job["metadata"]["name"]}
        return found

    def other_pod_labels(self) -> dict[str, dict[str, str]]:
        """Labels of the pods of a second cluster of these manifests, by ``other GROUP``."""
        found, name_of_this = {}, self.name
        for name, labels in self.pod_labels().items():
            other = {k: v.replace(name_of_this, f"{name_of_this}-b") for k, v in labels.items()}
            found[f"other {name}"] = {**other, PART_OF: labels.get(PART_OF, "")}
        return found

    def selected(self, selector: Mapping[str, Any]) -> set[str]:
        """Groups (and ``up``) whose pods a label selector matches, of this cluster or another."""
        pods = self.pod_labels() | self.other_pod_labels()
        return {name for name, labels in pods.items() if matches(selector, labels)}

    def operator_env(self, group: str) -> dict[str, str]:
        """Variables that the operator adds to a container for ``gcsFaultToleranceOptions``."""
        redis = self.cluster["spec"].get("gcsFaultToleranceOptions")
        if redis is None:
            return {}
        if group != "headgroup":
            return {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        return {
            "RAY_REDIS_ADDRESS": redis["redisAddress"],
            "RAY_external_storage_namespace": self.name,  # in truth a unique id
        }

    def start_command(self, group: str, head_address: str = "") -> list[str]:
        """The operator's ``ray start`` of a container; ``head_address`` as ``HOST:PORT``."""
        params = self.group(group).start_params()
        if group == "headgroup" and self.cluster["spec"].get("gcsFaultToleranceOptions"):
            params["redis-password"] = "$REDIS_PASSWORD"
        flags = [f"--{k}" if v == "true" else f"--{k}={v}" for k, v in sorted(params.items())]
        where = ["--head"] if group == "headgroup" else [f"--address={head_address}"]
        return ["ray", "start", *where, *flags]


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector (``matchLabels``, ``matchExpressions``) matches."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(_holds(e, labels) for e in selector.get("matchExpressions", []))


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value = labels.get(expression["key"])
    values: Sequence[str] = expression.get("values", ())
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:
            return value is None
