"""Who reaches whom: selectors, affinities, NetworkPolicies, ports.

A check yields what is wrong in a rendered overlay, nothing if all is well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cluster.gateway_config import GatewaySection
from tests.k8s.kuberay import AGENT_PORT, GROUPS, METRICS_PORT, Manifests, matches

DASHBOARD_PORT = 8265
WORKERS = ("attention", "experts")
PROMETHEUS = "prometheus"
ANYWHERE = "anywhere"
GATEWAY_SERVICES = ("expertmesh-gateway", "expertmesh-gateway-headless")
_DEFAULTS = GatewaySection()


def selectors(m: Manifests) -> Iterator[str]:
    """Every selector matches the pods of exactly the intended groups."""
    pods = set(GROUPS)
    intended = {
        "Service": {
            **{name: {"gateway"} for name in GATEWAY_SERVICES},
            f"{m.name}-inside": {"gateway"},
        },
        "PodDisruptionBudget": {
            f"{m.name}-head": {"headgroup"},
            **{f"{m.name}-{name}": {name} for name in GROUPS[1:]},
        },
        "NetworkPolicy": {
            f"{m.name}-cluster": pods,
            f"{m.name}-gateway": {"gateway"},
            f"{m.name}-jobs": {"headgroup"},
            f"{m.name}-metrics": pods,
        },
        "PodMonitor": {f"{m.name}-gateway": {"gateway"}, f"{m.name}-ray": pods},
    }
    for kind, expected in intended.items():
        for found in m.kind(kind):
            name, spec = found["metadata"]["name"], found["spec"]
            selector = spec["podSelector"] if kind == "NetworkPolicy" else spec["selector"]
            if kind == "Service":
                selector = {"matchLabels": selector}
            matched = m.selected(selector)
            if matched != expected.get(name):
                yield f"{kind}/{name}: matches {sorted(matched)}, not {expected.get(name)}"
    for kind in ("Service", "PodDisruptionBudget"):
        missing = intended[kind].keys() - {d["metadata"]["name"] for d in m.kind(kind)}
        yield from (f"{kind}/{name}: is missing" for name in sorted(missing))


def affinities(m: Manifests) -> Iterator[str]:
    """Gateways and expert pods are on hosts of their own; what is to be near knows each other."""
    for group in m.groups:
        affinity = group.pod.get("affinity", {})
        apart = _terms(affinity, "podAntiAffinity")
        hosts = [t for t in apart if t["topologyKey"] == "kubernetes.io/hostname"]
        if group.name in ("gateway", "experts") and len(hosts) != 1:
            yield f"{group.name}: pods may share a host"
        for term in apart:
            if (matched := m.selected(term["labelSelector"])) != {group.name}:
                yield f"{group.name}: is kept apart from {sorted(matched)}"
        for term in _terms(affinity, "podAffinity"):
            if (matched := m.selected(term["labelSelector"])) != set(WORKERS):
                yield f"{group.name}: is kept near {sorted(matched)}"


def _terms(affinity: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    terms: list[dict[str, Any]] = affinity.get(kind, {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution", []
    )
    return terms


def reach(m: Manifests) -> Iterator[str]:
    """The NetworkPolicies leave open what is public, and to whom."""
    public = (_DEFAULTS.port, _DEFAULTS.grpc_port)
    has_metrics = bool(m.kind("PodMonitor"))
    for group in GROUPS:
        for who, ports in _open_ports(m, group).items():
            expected: set[int | None] = set()
            if who in GROUPS:
                expected = {None}
            elif group == "gateway":
                expected = set(public)
            elif group == "headgroup" and who == "up":
                expected = {DASHBOARD_PORT}
            if who == PROMETHEUS and has_metrics:
                expected = expected | {METRICS_PORT}
            if (ports if None not in ports else {None}) != expected:
                yield f"{group}: {who} reaches {sorted(map(str, ports))}, not {expected}"


def _open_ports(m: Manifests, group: str) -> dict[str, set[int | None]]:
    """From whom -> ports of a group's pods, None for all."""
    labels = m.pod_labels()
    found: dict[str, set[int | None]] = {who: set() for who in (*labels, PROMETHEUS, ANYWHERE)}
    for policy in (p["spec"] for p in m.kind("NetworkPolicy")):
        if not matches(policy["podSelector"], labels[group]):
            continue
        for rule in policy.get("ingress", []):
            ports = {p["port"] for p in rule.get("ports", [])} or {None}
            for who in found:
                if _lets_in(rule, labels.get(who), who):
                    found[who] |= ports
    if not any(matches(p["spec"]["podSelector"], labels[group]) for p in m.kind("NetworkPolicy")):
        return {who: {None} for who in found}
    return found


def _lets_in(rule: dict[str, Any], labels: dict[str, str] | None, who: str) -> bool:
    if not rule.get("from"):
        return True
    for peer in rule["from"]:
        if "namespaceSelector" in peer and who == PROMETHEUS:
            return True
        if "podSelector" in peer and labels is not None and matches(peer["podSelector"], labels):
            return "namespaceSelector" not in peer
    return False


def ports(m: Manifests) -> Iterator[str]:
    """One number for each port: in code, container, Service, probe and route."""
    http, grpc = (
        m.engine.get("port", _DEFAULTS.port),
        m.engine.get("grpc-port", _DEFAULTS.grpc_port),
    )
    if (http, grpc) != (_DEFAULTS.port, _DEFAULTS.grpc_port):
        yield f"engine.yaml: serves {http} and {grpc}, where the policies know the defaults"
    gateway = m.group("gateway")
    if (gateway.ports.get("http"), gateway.ports.get("grpc")) != (http, grpc):
        yield f"gateway: container ports are {gateway.ports}"
    if gateway.container["readinessProbe"].get("grpc", {}).get("port") != grpc:
        yield "gateway: readiness does not ask its gRPC port"
    for group in m.groups:
        if group.ports.get("metrics") != METRICS_PORT:
            yield f"{group.name}: Ray's metrics are on {METRICS_PORT}"
        admin = {_DEFAULTS.admin_port or 8001, _DEFAULTS.admin_grpc_port or 50052}
        if admin & set(group.ports.values()):
            yield f"{group.name}: shows the admin port"
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            for number in re.findall(r"localhost:(\d+)", str(group.container.get(name))):
                if int(number) not in (AGENT_PORT, group.ports.get("dashboard")):
                    yield f"{group.name}: {name} asks port {number}"
    yield from _service_ports(m, http, grpc)
    service = {p["port"] for p in m.named("Service", "expertmesh-gateway")["spec"]["ports"]}
    for kind, port in (("HTTPRoute", http), ("GRPCRoute", grpc)):
        for backend in (
            b for r in m.kind(kind) for x in r["spec"]["rules"] for b in x["backendRefs"]
        ):
            if (backend["name"], backend["port"]) != ("expertmesh-gateway", port):
                yield f"{kind}: leads to {backend}"
            if backend["port"] not in service:
                yield f"{kind}: the Service has no port {backend['port']}"
    for monitor in m.kind("PodMonitor"):
        names = {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]}
        for name in m.selected(monitor["spec"]["selector"]) & set(GROUPS):
            if not names <= m.group(name).ports.keys():
                yield f"PodMonitor/{monitor['metadata']['name']}: {name} has no port {names}"


def _service_ports(m: Manifests, http: int, grpc: int) -> Iterator[str]:
    gateway = m.group("gateway").ports
    for service in m.kind("Service"):
        name = service["metadata"]["name"]
        found = {}
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            found[port["name"]] = port["port"]
            if (gateway.get(target) if isinstance(target, str) else target) != port["port"]:
                yield f"Service/{name}: {port['name']} leads to {target}"
        wanted = {"http": http, "grpc": grpc} if name in GATEWAY_SERVICES else {"http": http}
        if found != wanted:
            yield f"Service/{name}: has ports {found}"
        kinds = {p["name"]: p.get("appProtocol") for p in service["spec"]["ports"]}
        if kinds.get("grpc", "kubernetes.io/h2c") != "kubernetes.io/h2c":
            yield f"Service/{name}: proxies would not speak HTTP/2 to gRPC"
    if m.named("Service", "expertmesh-gateway-headless")["spec"].get("clusterIP") != "None":
        yield "Service/expertmesh-gateway-headless: has an address of its own"
