"""Which pods reach which: selectors, affinities, NetworkPolicies, ports.

A check yields what is wrong in a rendered overlay, nothing if all is well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cluster.config.gateway import GatewaySection
from tests.k8s.kuberay import AGENT_PORT, GROUPS, METRICS_PORT, Manifests, matches

DASHBOARD_PORT = 8265
WORKERS = ("attention", "experts")
PROMETHEUS = "prometheus"
ANYWHERE = "anywhere"
"""A pod without labels, or no pod at all."""
NAMESPACE = "kubernetes.io/metadata.name"
GATEWAY_SERVICES = ("expertmesh-gateway", "expertmesh-gateway-headless")
_DURING = "DuringSchedulingIgnoredDuringExecution"
_PROTOCOLS = {"http": "http", "grpc": "kubernetes.io/h2c"}
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
            f"{m.name}-up": {"up"},
            f"{m.name}-redis": {"headgroup"},
            f"{m.name}-apiserver": {"headgroup"},
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
        apart = terms(affinity, "podAntiAffinity")
        if group.name == "gateway" and m.group("experts").replicas <= 1:  # there may be one node
            wished = affinity.get("podAntiAffinity", {}).get(f"preferred{_DURING}", [])
            apart += [term["podAffinityTerm"] for term in wished]
        hosts = [t for t in apart if t.get("topologyKey") == "kubernetes.io/hostname"]
        if group.name in ("gateway", "experts") and len(hosts) != 1:
            yield f"{group.name}: pods may share a host"
        for term in apart:
            if (matched := m.selected(term["labelSelector"])) != {group.name}:
                yield f"{group.name}: is kept apart from {sorted(matched)}"
        for term in terms(affinity, "podAffinity"):
            if not term.get("topologyKey"):
                yield f"{group.name}: is kept near nobody"
            if (matched := m.selected(term["labelSelector"])) != set(WORKERS):
                yield f"{group.name}: is kept near {sorted(matched)}"


def terms(affinity: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """What must hold of a kind of affinity."""
    found: list[dict[str, Any]] = affinity.get(kind, {}).get(f"required{_DURING}", [])
    return list(found)


def reach(m: Manifests) -> Iterator[str]:
    """The NetworkPolicies open public ports to all pods, and other ports to their clients only."""
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
    """Caller -> ports of a group's pods that it reaches, None for all."""
    pods = m.pod_labels()
    labels: dict[str, dict[str, str]] = {
        **pods,
        **m.other_pod_labels(),
        PROMETHEUS: {},
        ANYWHERE: {},
    }
    found: dict[str, set[int | None]] = {who: set() for who in labels}
    policies = [
        p["spec"]
        for p in m.kind("NetworkPolicy")
        if matches(p["spec"]["podSelector"], pods[group])
        and "Ingress" in p["spec"].get("policyTypes", ["Ingress"])
    ]
    for rule in (r for p in policies for r in p.get("ingress", [])):
        for who in found:
            if _lets_in(rule, labels[who], who):
                found[who] |= _tcp_ports(rule)
    return found if policies else {who: {None} for who in found}


def leaving(m: Manifests) -> Iterator[str]:
    """Pods reach each other, DNS and Redis; the Job's pod the job API, and nothing reaches it."""
    spec = m.cluster["spec"]
    redis = spec.get("gcsFaultToleranceOptions", {}).get("redisAddress", "")
    for name, labels in m.pod_labels().items():
        policies = [
            p["spec"] for p in m.kind("NetworkPolicy") if matches(p["spec"]["podSelector"], labels)
        ]
        rules = {
            _leaves(m, rule)
            for policy in policies
            if "Egress" in policy.get("policyTypes", ["Egress"])
            for rule in policy.get("egress", [])
        }
        expected = {(ANYWHERE, frozenset({("UDP", 53), ("TCP", 53)}))}
        if name == "up":
            expected.add(("headgroup", frozenset({("TCP", DASHBOARD_PORT)})))
            if not any("Ingress" in p.get("policyTypes", ["Ingress"]) for p in policies):
                yield "up: may be reached"
        else:
            expected.add((" ".join(sorted(GROUPS)), frozenset()))
        if name == "headgroup" and spec.get("enableInTreeAutoscaling"):
            expected.add((ANYWHERE, frozenset({("TCP", 443), ("TCP", 6443)})))
        if name == "headgroup" and redis:
            expected.add((ANYWHERE, frozenset({("TCP", int(redis.rpartition(":")[2]))})))
        if rules != expected:
            yield f"{name}: reaches {sorted(map(str, rules))}"


def _leaves(m: Manifests, rule: dict[str, Any]) -> tuple[str, frozenset[tuple[str, int]]]:
    """Where a rule lets pods go: groups, or anywhere; and the ports, none for all."""
    peers = rule.get("to")
    if peers is None:
        where = ANYWHERE
    else:
        groups = {group for peer in peers for group in m.selected(peer["podSelector"])}
        where = " ".join(sorted(groups))
    return where, frozenset((p.get("protocol", "TCP"), p["port"]) for p in rule.get("ports", []))


def _tcp_ports(rule: dict[str, Any]) -> set[int | None]:
    given = rule.get("ports", [])
    return {p["port"] for p in given if p.get("protocol", "TCP") == "TCP"} if given else {None}


def _lets_in(rule: dict[str, Any], labels: dict[str, str], who: str) -> bool:
    if not rule.get("from"):
        return True
    for peer in rule["from"]:
        if "namespaceSelector" in peer:
            # of another namespace, whose name is the one that is asked for, or is not
            wanted = peer["namespaceSelector"].get("matchLabels", {}).get(NAMESPACE, "elsewhere")
            name = {NAMESPACE: wanted if who == PROMETHEUS else "elsewhere"}
            if matches(peer["namespaceSelector"], name):
                return True
        elif "podSelector" in peer and who != PROMETHEUS and matches(peer["podSelector"], labels):
            return True
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
            for number in re.findall(
                r"(?:localhost|\$POD_IP):(\d+)", str(group.container.get(name))
            ):
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
        if service["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"Service/{name}: is of type {service['spec']['type']}"
        kinds = {p["name"]: p.get("appProtocol") for p in service["spec"]["ports"]}
        if kinds != {name: _PROTOCOLS[name] for name in wanted}:
            yield f"Service/{name}: proxies would speak {kinds}"
    if m.named("Service", "expertmesh-gateway-headless")["spec"].get("clusterIP") != "None":
        yield "Service/expertmesh-gateway-headless: has an address of its own"
