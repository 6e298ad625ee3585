"""Labels of Ray nodes: their role, failure domain, link class and speed, as an operator sets them.

    ray start ... --labels "expertmesh/role=expert,expertmesh/failure-domain=rack-7"

A node without labels may hold every role that no node is labelled for. It is a failure domain and a
link class of its own, with devices of speed 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.core.errors import ConfigError

ROLE = "expertmesh/role"
"""The role: one of ``ROLES``."""
ROLES = ("attention", "expert", "colocated", "gateway")
"""Roles of workers; ``gateway`` is for gateway replicas and the controller."""
FAILURE_DOMAIN = "expertmesh/failure-domain"
"""Failure domain: copies of an expert are in two of them where slots allow."""
LINK_CLASS = "expertmesh/link-class"
"""Nodes with the same class have fast links: weights come from there first."""
DEVICE_SPEED = "expertmesh/device-speed"
"""Speed of the node's devices, relative to other nodes: load is in proportion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLabels:
    """A node's labels."""

    role: str = ""
    """Role; empty: every role that no node is labelled for."""
    domain: str = ""
    """Failure domain; empty: the node itself."""
    link_class: str = ""
    """Link class; empty: the node itself."""
    speed: float = 1.0
    """Relative speed of a device."""

    @classmethod
    def of(cls, labels: Mapping[str, str], node: str) -> NodeLabels:
        """Read a node's labels. Raises ``ConfigError`` naming label and node."""
        role = labels.get(ROLE, "")
        if role and role not in ROLES:
            rule = f"must be one of {', '.join(ROLES)}"
            raise ConfigError(f"label {ROLE} of node {node}", role, rule)
        return cls(
            role=role,
            domain=labels.get(FAILURE_DOMAIN, ""),
            link_class=labels.get(LINK_CLASS, ""),
            speed=_speed(labels.get(DEVICE_SPEED, "1"), node),
        )


def selector_for(role: str, places: Iterable[NodeLabels]) -> dict[str, str]:
    """Ray's label selector of the nodes that a role may run on; empty where any will do."""
    labelled = {place.role for place in places if place.role}
    if role in labelled:
        return {ROLE: role}
    return {ROLE: f"!in({','.join(ROLES)})"} if labelled else {}


def _speed(text: str, node: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not (math.isfinite(speed) and speed > 0):
        raise ConfigError(f"label {DEVICE_SPEED} of node {node}", text, "must be above 0")
    return speed
