"""The adapters that one gateway knows, those that a caller may use, and those in use."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from gateway.auth.auth import CALLER

_LABEL = re.compile(rb'(?:lora_name|(?:running|waiting)_lora_adapters)="([^"]*)"')
"""Matches metric labels with adapter names, which are separated by commas."""


class AdapterCatalog:
    """Adapters of one gateway; the key of an adapter is ``name@number``, new at each load.

    Methods, but not properties, hide adapters of other tenants.
    """

    def __init__(self) -> None:
        self._known: Sequence[Mapping[str, Any]] = ()
        """Adapters in any state, as the controller describes them."""
        self._ready: dict[str, Mapping[str, Any]] = {}
        """Ready adapters by name."""
        self._keys: dict[Hashable, str] = {}
        """Key of the adapter of each running call that uses one."""

    @property
    def keys(self) -> list[str]:
        """Keys (``name@number``) of the adapters that requests may name."""
        return [str(adapter["key"]) for adapter in self._ready.values()]

    @property
    def in_use(self) -> tuple[str, ...]:
        """Keys (``name@number``) of the adapters that running or waiting calls use."""
        return tuple(sorted({*self._keys.values()}))

    def follow(self, snapshot: Mapping[str, Any]) -> None:
        """Update the adapters from a new snapshot."""
        self._known = snapshot.get("adapters", ())
        self._ready = {a["name"]: a for a in self._known if a["state"] == "READY"}

    def names(self) -> list[str]:
        """Names of the adapters that the caller may use."""
        return [name for name, adapter in self._ready.items() if self._may_use(adapter)]

    def find(self, name: str) -> str | None:
        """Key of the adapter with this name; None unless the caller may use such an adapter."""
        adapter = self._ready.get(name)
        return str(adapter["key"]) if adapter is not None and self._may_use(adapter) else None

    def may_unload(self, name: str) -> bool:
        """Whether the caller may use this adapter, or this gateway does not know it."""
        named = (one for one in self._known if one["name"] == name)
        return all(self._may_use(one) for one in named if one["state"] != "UNLOADING")

    def without_others(self, status: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a status without the adapters that the caller may not use."""
        adapters = [a for a in status.get("adapters", ()) if self._may_use(a)]
        return {**status, "adapters": adapters} if "adapters" in status else dict(status)

    def without_series_of_others(self, exposition: bytes) -> bytes:
        """Remove the metrics series of adapters that the caller may not use."""
        hidden = {a["name"].encode() for a in self._known if not self._may_use(a)}
        if not hidden:
            return exposition
        lines = exposition.splitlines(keepends=True)
        return b"".join(line for line in lines if hidden.isdisjoint(_named_in(line)))

    def begin(self, call: Hashable, key: str) -> None:
        """Record the adapter of a call; ``key`` is empty without an adapter."""
        if key:
            self._keys[call] = key

    def end(self, call: Hashable) -> None:
        """Record that the call has ended."""
        self._keys.pop(call, None)

    def _may_use(self, adapter: Mapping[str, Any]) -> bool:
        tenants, caller = adapter.get("tenants") or (), CALLER.get()
        if not tenants:
            return True
        if caller is None:
            return False
        return caller.is_admin or caller.entry.tenant in tenants


def _named_in(line: bytes) -> set[bytes]:
    """Names of adapters in one line of a metrics exposition."""
    if b"lora_" not in line:
        return set()
    return {name for value in _LABEL.findall(line) for name in value.split(b",")}
