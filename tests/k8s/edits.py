"""What the changes of overlays are written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from tests.k8s.kuberay import Manifests

Row = tuple[str, str, str, Callable[[Manifests], object]]
"""Check, overlay, what is changed, and how."""
MULTI = "gpu-multi-node"


def pod(m: Manifests, group: str) -> dict[str, Any]:
    return m.group(group).pod


def box(m: Manifests, group: str) -> dict[str, Any]:
    return m.group(group).container


def spec(m: Manifests, kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = m.named(kind, f"expertmesh-{name}")["spec"]
    return found


def set_engine(m: Manifests, **options: object) -> None:
    """Other values in engine.yaml; underscores stand for dashes, None takes one out."""
    (found,) = [d for d in m.kind("ConfigMap") if "engine.yaml" in d["data"]]
    changed = m.engine | {k.replace("_", "-"): v for k, v in options.items()}
    kept = {k: v for k, v in changed.items() if v is not None}
    found["data"]["engine.yaml"] = yaml.safe_dump(kept)


def set_env(m: Manifests, group: str, name: str, value: str) -> None:
    env = box(m, group)["env"]
    env[:] = [e for e in env if e["name"] != name] + [{"name": name, "value": value}]


def near(m: Manifests, group: str) -> dict[str, Any]:
    """The first term of what a group is kept apart from."""
    terms = pod(m, group)["affinity"]["podAntiAffinity"]
    found: dict[str, Any] = terms["requiredDuringSchedulingIgnoredDuringExecution"][0]
    return found


def set_limit(m: Manifests, group: str, resource: str, amount: str) -> None:
    for kind in ("limits", "requests"):
        box(m, group)["resources"][kind][resource] = amount


def up_words(m: Manifests) -> list[str]:
    words: list[str] = spec(m, "Job", "up")["template"]["spec"]["containers"][0]["command"]
    return words


def start_param(m: Manifests, name: str, value: str) -> None:
    m.group("experts").spec["rayStartParams"][name] = value


def set_version(m: Manifests, version: str) -> None:
    m.cluster["spec"]["rayVersion"] = version


def set_images(m: Manifests, image: str) -> None:
    for group in m.groups:
        group.container["image"] = image
    spec(m, "Job", "up")["template"]["spec"]["containers"][0]["image"] = image


def set_port(m: Manifests, group: str, name: str, number: int) -> None:
    (port,) = [p for p in box(m, group)["ports"] if p["name"] == name]
    port["containerPort"] = number


def labels_of(m: Manifests, kind: str, name: str) -> dict[str, str]:
    labels: dict[str, str] = spec(m, kind, name)["selector"]["matchLabels"]
    return labels


def drop(m: Manifests, kind: str, name: str) -> None:
    m.objects.remove(m.named(kind, f"expertmesh-{name}"))


def rename(m: Manifests, group: str, name: str) -> None:
    m.group(group).spec["groupName"] = name


def swap(command: dict[str, Any], old: str, new: str) -> None:
    command["command"] = [word.replace(old, new) for word in command["command"]]


def unknown() -> dict[str, Any]:
    return {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "thing"}}


def leave_to_defaults(m: Manifests, group: str) -> None:
    """Kubernetes' grace for a pod and Ray's for a node: 30 s each."""
    del pod(m, group)["terminationGracePeriodSeconds"]
    set_env(m, group, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "30")
