"""API keys in the options of ``serve`` and in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.config.api_keys import hash_key

_VARIABLES = {
    "gateway.api_keys": "EXPERTMESH_API_KEYS",
    "gateway.admin_keys": "EXPERTMESH_ADMIN_KEYS",
}


def collect_keys(
    values: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """The keys of the options among ``values``, and more from the environment, hashed.

    ``EXPERTMESH_API_KEYS`` and ``EXPERTMESH_ADMIN_KEYS`` hold keys with commas between them.
    """
    found = {}
    for target, variable in _VARIABLES.items():
        more = (key.strip() for key in environment.get(variable, "").split(","))
        keys = [key for key in (values.get(target, ""), *more) if key]
        if keys:
            found[target] = tuple(map(hash_key, dict.fromkeys(keys)))
    return found


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for processes that need no keys."""
    names = {f"EXPERTMESH_{kind}_KEY{s}" for kind in ("API", "ADMIN") for s in ("", "S")}
    return {name: value for name, value in environment.items() if name not in names}
