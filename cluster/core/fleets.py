"""Names of fleets in Ray. A fleet is the controller and the workers of one served model.

Each fleet has a Ray namespace of its own, so that workers of several models may have equal names.
"""

from __future__ import annotations

import re
from pathlib import Path

NAMESPACE = "expertmesh"
"""Ray namespace of the first fleet, and prefix of the namespaces of all fleets."""
CONTROLLER_NAME = "expertmesh-controller"
"""Name of a fleet's controller actor in the namespace of the fleet."""
MODELS_NAME = "expertmesh-models"
"""Name of the actor that keeps the table of models, in the namespace of the first fleet."""
_NAMESPACE = re.compile(rf"{NAMESPACE}(\.model-\d+)?")
_FLEET = re.compile(r"model-\d+")
_GROUP = re.compile(rf"{_NAMESPACE.pattern}-workers(-.+)?")


def fleet_name(place: int) -> str:
    """Return the name of the fleet of the model at ``place`` among the served models, from 0.

    The first fleet has no name: where one model is served, nothing in Ray shows that there may be
    several.
    """
    return f"model-{place}" if place else ""


def own_folder(folder: str, fleet: str) -> str:
    """Return the subfolder for a fleet of ``folder``, which may be the subfolder of another one.

    The first fleet uses the folder itself.
    """
    path = Path(folder)
    root = path.parent if _FLEET.fullmatch(path.name) else path
    return str(root / fleet)


def namespace_of(fleet: str) -> str:
    """Return the Ray namespace of a fleet's actors."""
    return f"{NAMESPACE}.{fleet}" if fleet else NAMESPACE


def workers_group(namespace: str) -> str:
    """Return the name of the placement group that reserves resources for the initial workers.

    With ``-`` and the name of a place appended, the name of the group of a place that scaling adds.
    """
    return f"{namespace}-workers"


def namespace_of_group(name: str) -> str:
    """Return the namespace of the fleet to which a placement group belongs."""
    return name.partition("-workers")[0]


def is_namespace(name: str) -> bool:
    """Whether this is the Ray namespace of a fleet."""
    return _NAMESPACE.fullmatch(name) is not None


def is_group(name: str, namespace: str | None = None) -> bool:
    """Whether a placement group with this name belongs to a fleet; without namespace, to any."""
    if namespace is None:
        return _GROUP.fullmatch(name) is not None
    own = workers_group(namespace)
    return name == own or name.startswith(f"{own}-")
