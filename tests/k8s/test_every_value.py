"""A sweep: no value of a manifest may go or become another without a check that sees it.

``changes.py`` has changes that somebody may really make; here everything is taken away once, and
every number, word and switch made another. What may change is listed below, with the reason.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.k8s.kuberay import Manifests
from tests.k8s.test_manifests import CHECKS, rendered

Path = tuple[str | int, ...]

SLOW = {"schemas", "guide", "devices", "memory", "copies", "options"}
"""Checks that plan a start or walk whole schemas: ``changes.py`` is enough for them."""
SUMS = re.compile(
    r"RayCluster\.spec\.\w+(\.\d)?\.(replicas|(min|max)Replicas|template\.spec\.containers\.0\.resources)"
    r"|ConfigMap\.data"
)
"""What only those see."""
DEFAULTS = re.compile(
    r"Service\.spec\.(type|ports\.\d\.targetPort)"
    r"|NetworkPolicy\.spec\.(policyTypes|(in|e)gress\.\d\.ports\.\d\.protocol)"
    r"|GRPCRoute\.spec\.rules\.0\.matches\.\d\.method\.type"
    r"|PodMonitor\.spec\.(podMetricsEndpoints\.0\.path|selector\.matchLabels\.ray\.io/is-ray-node)"
    r"|RayCluster\.spec\.enableInTreeAutoscaling"
)
"""Kubernetes or KubeRay takes the same where it is not said."""
YOURS = re.compile(
    r"\w+Route\.spec\.(hostnames\.0|parentRefs\.0\.name(space)?)"
    r"|NetworkPolicy\.spec\.ingress\.0\.from\.0\.namespaceSelector\.matchLabels\.[\w./]+"
    r"|RayCluster\.spec\.(gcsFaultToleranceOptions\.redisPassword\.valueFrom\.secretKeyRef\.name"
    r"|workerGroupSpecs\.\d\.template\.spec\.(runtimeClassName"
    r"|affinity\.podAffinity\.requiredDuringSchedulingIgnoredDuringExecution\.0\.topologyKey"
    r"|volumes\.1\.emptyDir\.sizeLimit|containers\.0\.env\.\d+\.value))"
)
"""Words of settings.yaml that say what a user's cluster has; of variables those of the network."""
NETWORK = {"NCCL_IB_HCA"}


def places(x: Any, above: Path = ()) -> Iterator[Path]:
    """All values in a document, containers before what they hold."""
    items: Any = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def another(value: Any) -> Any:
    """Another value of the same kind; None for a container."""
    match value:
        case bool():
            return not value
        case int():
            return value * 10 if value else 1
        case str():
            return f"10{value}" if value[:1].isdigit() else f"{value}x"
    return None


def sees(m: Manifests) -> bool:
    """Whether any check finds something wrong; one that cannot go on has."""
    for name, check in CHECKS.items():
        if name in SLOW:
            continue
        try:
            if next(iter(check(m)), None) is not None:
                return True
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, AssertionError):
            return True
    return False


def unseen(m: Manifests) -> Iterator[str]:
    """Where a change of the manifests is seen by no check."""
    for found in m.objects:
        for path in list(places(found)):
            where = ".".join(map(str, (found["kind"], *path)))
            if path[0] in ("apiVersion", "kind") or SUMS.match(where):
                continue
            holder: Any = found
            for key in path[:-1]:
                holder = holder[key]
            for how, value in (("gone", None), ("another", another(holder[path[-1]]))):
                if (how == "another" and value is None) or may_change(where, how, holder):
                    continue
                before = copy.copy(holder)
                if how == "gone":
                    del holder[path[-1]]
                else:
                    holder[path[-1]] = value
                if not sees(m):
                    yield f"{where}: {how}"
                holder.clear()
                holder.update(before) if isinstance(holder, dict) else holder.extend(before)


def may_change(where: str, how: str, holder: Any) -> bool:
    """Whether it is listed above."""
    if how == "gone":
        return DEFAULTS.fullmatch(where) is not None
    is_variable = ".env." in where
    return YOURS.fullmatch(where) is not None and (not is_variable or holder["name"] in NETWORK)


@pytest.mark.slow
def test_no_value_is_without_a_check() -> None:
    m = rendered("gpu-multi-node")
    assert not sees(m)
    assert list(unseen(m)) == []
    assert not sees(m)  # every change was taken back
