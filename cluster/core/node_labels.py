"""Labels that an operator sets on Ray nodes: role, failure domain, link class and speed.

    ray start ... --labels "expertmesh/role=expert,expertmesh/failure-domain=rack-7"

A node without labels may run every role for which no node has a label. It is a failure domain and a
link class of its own, and its devices have speed 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.core.errors import ConfigError

ROLE = "expertmesh/role"
"""Name of the Ray node label with the role of the node's workers: one of ``ROLES``."""
ROLES = ("attention", "expert", "colocated", "gateway")
"""Values of the role label; ``gateway`` is for gateway replicas and the controller."""
FAILURE_DOMAIN = "expertmesh/failure-domain"
"""Name of the Ray node label with the failure domain. If slots allow, an expert has copies in two
domains."""
LINK_CLASS = "expertmesh/link-class"
"""Name of the Ray node label with the link class. Nodes of one class have fast links to each other;
a plan names the nearest source of each move."""
DEVICE_SPEED = "expertmesh/device-speed"
"""Name of the Ray node label with the relative speed of the node's devices, to which their load is
proportional."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLabels:
    """The values of the labels that an operator set on a Ray node."""

    role: str = ""
    """Role of the node's workers; empty: every role for which no node has a label."""
    domain: str = ""
    """Failure domain; empty: the node is a failure domain of its own."""
    link_class: str = ""
    """Link class; empty: the node is a link class of its own."""
    speed: float = 1.0
    """Relative speed of a device of the node in computing experts."""

    @classmethod
    def of(cls, labels: Mapping[str, str], node: str) -> NodeLabels:
        """Read a node's labels. Raises ``ConfigError`` with the invalid label and the node."""
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
    """Return Ray's label selector for the nodes on which a role may run; empty for any node.

    ``places``: labels of the nodes from which to select.
    """
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
