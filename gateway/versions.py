"""Versions of this program and of what it runs on, without importing any of it."""

from __future__ import annotations

import functools
from importlib import metadata

from cluster.config import ClusterConfig


@functools.cache
def installed_version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """Version of expertmesh; ``0+unknown`` when it runs from a folder that is not installed."""
    return installed_version("expertmesh") or "0+unknown"


def system_fingerprint(config: ClusterConfig) -> str:
    """Tells whether two answers came from the same program and configuration."""
    return f"expertmesh-{own_version()}-{config.fingerprint()}"
