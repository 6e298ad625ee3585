"""Adapters of requests that are at gateways: they wait there for a place or for a worker.

A gateway reports them whenever it asks for a snapshot, with the version that it knows. Until it
knows that an adapter is unloaded, it may accept requests that name it. Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Report:
    version: int
    """Of the snapshot that the gateway knows."""
    keys: frozenset[str]
    """Of the adapters that its requests have."""


class AdapterUses:
    """The newest report of each gateway, and when adapters were unloaded."""

    def __init__(self) -> None:
        self._reports: dict[str, _Report] = {}
        self._retired: dict[str, int] = {}

    def report(self, gateway: str, version: int, keys: Collection[str]) -> None:
        """A gateway knows the snapshot of this version, and its requests have these adapters."""
        self._reports[gateway] = _Report(version, frozenset(keys))

    def leave(self, gateway: str) -> None:
        """A gateway has gone, and its requests with it."""
        self._reports.pop(gateway, None)

    def retire(self, key: str, version: int) -> None:
        """Snapshots from this version on say that an adapter is unloaded."""
        self._retired[key] = version

    def forget(self, key: str) -> None:
        """The adapter is freed."""
        self._retired.pop(key, None)

    def may_use(self, key: str) -> bool:
        """Whether a request at a gateway has this adapter, or may have it."""
        version = self._retired.get(key, 0)
        return any(key in r.keys or r.version < version for r in self._reports.values())
