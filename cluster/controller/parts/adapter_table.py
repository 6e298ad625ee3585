"""The adapters that the workers have, or that they load or free."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from cluster.controller.parts.memory import KeptAdapter
from cluster.core.frames import Adapter
from cluster.core.states import AdapterState, next_state


class AdapterTable:
    """Decides which adapter a name means. Changed by ``Adapters`` only."""

    def __init__(self) -> None:
        self.by_key: Mapping[str, KeptAdapter] = {}
        self.was_ordered = False
        """Workers may have adapters."""

    def restore(self, kept: Iterable[KeptAdapter], was_ordered: bool) -> None:
        """Continue for an earlier controller."""
        self.by_key = {k.adapter.key: k for k in kept}
        self.was_ordered = was_ordered

    def in_state(self, state: AdapterState) -> list[KeptAdapter]:
        return [kept for kept in self.by_key.values() if kept.state is state]

    def named(self, name: str) -> KeptAdapter | None:
        """The adapter of a name, unless it is being unloaded."""
        return next(
            (
                kept
                for kept in self.by_key.values()
                if kept.adapter.name == name and kept.state is not AdapterState.UNLOADING
            ),
            None,
        )

    def add(self, name: str, path: str, tenants: tuple[str, ...], number: int) -> KeptAdapter:
        """An adapter that was requested with the command of this number."""
        adapter = Adapter(key=f"{name}@{number}", name=name, path=path, tenants=tenants)
        kept = KeptAdapter(adapter=adapter, state=AdapterState.LOADING, number=number)
        self._put(kept)
        self.was_ordered = True
        return kept

    def enter(self, kept: KeptAdapter, state: AdapterState) -> None:
        """Change the state. Raises ``IllegalTransitionError``."""
        self._put(replace(kept, state=next_state(kept.state, state)))

    def remove(self, key: str) -> None:
        """Workers free it."""
        self.by_key = {k: kept for k, kept in self.by_key.items() if k != key}

    def compare_digests(self, digests: Mapping[str, str]) -> list[str]:
        """Keep the digests of the files that a worker has read; adapters of which other workers
        have read other files.
        """
        differing = []
        for key, digest in digests.items():
            if (kept := self.by_key.get(key)) is None:
                continue
            if (known := kept.adapter.digest or digest) != digest:
                differing.append(key)
            self._put(replace(kept, adapter=replace(kept.adapter, digest=known)))
        return differing

    def note_lacking(self, worker: str, keys: Collection[str]) -> list[str]:
        """Note the adapters that a worker could not load; those for which this has changed."""
        changed = []
        for key, kept in list(self.by_key.items()):
            if (key in keys) != (worker in kept.lacking):
                others = tuple(name for name in kept.lacking if name != worker)
                self._put(replace(kept, lacking=(*others, worker) if key in keys else others))
                changed.append(key)
        return changed

    def to_list(self) -> list[dict[str, Any]]:
        """All of them, fit for JSON."""
        return [
            {
                "name": kept.adapter.name,
                "key": kept.adapter.key,
                "path": kept.adapter.path,
                "state": kept.state.value,
                "lacking": list(kept.lacking),
                "tenants": list(kept.adapter.tenants),
            }
            for kept in self.by_key.values()
        ]

    def _put(self, kept: KeptAdapter) -> None:
        self.by_key = {**self.by_key, kept.adapter.key: kept}
