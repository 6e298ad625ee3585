"""The release of this program, and properties that must be equal on all workers of a cluster."""

from __future__ import annotations

import functools
from importlib import metadata

from cluster.core.codec import Message
from cluster.core.errors import HandshakeError


@functools.cache
def installed_version(package: str) -> str | None:
    """Return the version of an installed package without importing it; None if not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


RELEASE = installed_version("expertmesh") or "0+unknown"
"""Version of expertmesh; ``0+unknown`` if it runs from a folder that is not installed."""


def check_release(theirs: str, peer: str, ours: str, me: str) -> None:
    """Raise ``HandshakeError`` if the release of ``peer`` (``theirs``) and of ``me`` (``ours``)
    differ."""
    if theirs != ours:
        known = f"release {theirs[:64]}" if theirs else "no release"
        raise HandshakeError(f"{known} of {peer}, {ours} of {me}: releases must be equal")


class Build(Message, frozen=True, kw_only=True):
    """Properties of a worker's program and configuration that must be equal on all workers."""

    release: str = RELEASE
    checkpoint_id: str = ""
    config_hash: str = ""
    """Fingerprint of the configuration, from ``ClusterConfig.fingerprint``."""
    kv_cache_dtype: str = ""
    """Type in which attention workers exchange KV blocks (``EngineSection.kv_cache_dtype``). Also
    part of ``config_hash``, but compared first for a clearer error."""
    expert_form: str = ""
    """Quantization format of the worker's experts, in which they are transferred; empty if they are
    in the model dtype."""


_BUILD_ITEMS = {
    "release": "release",
    "checkpoint": "checkpoint_id",
    "KV cache type": "kv_cache_dtype",
    "form of experts": "expert_form",
    "configuration": "config_hash",
}


def differing_item(name: str, mine: Build, peer: str, theirs: Build) -> str | None:
    """Return a text about the first item in which two builds differ; None if they are equal."""
    for item, field in _BUILD_ITEMS.items():
        here, there = getattr(mine, field), getattr(theirs, field)
        if here != there:
            return f"{item} of {peer} is {there}, {name} has {here}"
    return None
