"""Versions of this program and of its dependencies, without importing them."""

from __future__ import annotations

import functools
from importlib import metadata


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
