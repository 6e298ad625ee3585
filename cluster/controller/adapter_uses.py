"""Adapters that requests at gateways use, including requests that still wait for a worker.

A gateway reports these adapters with each poll for a snapshot, together with the version of the
snapshot that it has. Until that snapshot shows an adapter as unloaded, the gateway may accept
requests that name the adapter. Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Report:
    version: int
    """Version of the controller's snapshot that the gateway has."""
    keys: frozenset[str]
    """Keys of the adapters that requests at the gateway use."""


class AdapterUses:
    """Adapters that requests at the gateways use: the newest report of each gateway."""

    def __init__(self) -> None:
        self._reports: dict[str, _Report] = {}
        self._retired: dict[str, int] = {}

    def report(self, gateway: str, version: int, keys: Collection[str]) -> None:
        """Record the snapshot version that a gateway has and the adapters that its requests use."""
        self._reports[gateway] = _Report(version, frozenset(keys))

    def leave(self, gateway: str) -> None:
        """Forget the report of a gateway that has ended."""
        self._reports.pop(gateway, None)

    def retire(self, key: str, version: int) -> None:
        """Record that the cluster's snapshots show an adapter as unloaded from ``version`` on."""
        self._retired[key] = version

    def forget(self, key: str) -> None:
        """Forget an adapter that the workers free."""
        self._retired.pop(key, None)

    def may_use(self, key: str) -> bool:
        """Return whether a request at any gateway uses the adapter or may still start to use it."""
        version = self._retired.get(key, 0)
        return any(key in r.keys or r.version < version for r in self._reports.values())
