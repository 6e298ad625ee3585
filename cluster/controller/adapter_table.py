"""Table of the LoRA adapters that the attention workers have, load or free."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from cluster.controller.controller_memory import KeptAdapter
from cluster.core.frames import AdapterRecord
from cluster.core.states import AdapterState, next_state


class AdapterTable:
    """Table of the LoRA adapters of the cluster, by key. Changed by ``Adapters``."""

    def __init__(self) -> None:
        self.by_key: Mapping[str, KeptAdapter] = {}
        self.was_ordered = False
        """Whether workers may have received a command about adapters."""

    def restore(self, kept: Iterable[KeptAdapter], was_ordered: bool) -> None:
        """Restore the table from the state of an earlier controller.

        ``was_ordered``: whether workers may have received a command about adapters.
        """
        self.by_key = {k.adapter.key: k for k in kept}
        self.was_ordered = was_ordered

    def in_state(self, state: AdapterState) -> list[KeptAdapter]:
        return [kept for kept in self.by_key.values() if kept.state is state]

    def named(self, name: str) -> KeptAdapter | None:
        """Return the adapter with this name, unless it is being unloaded; None if there is none."""
        return next(
            (
                kept
                for kept in self.by_key.values()
                if kept.adapter.name == name and kept.state is not AdapterState.UNLOADING
            ),
            None,
        )

    def add(self, name: str, path: str, tenants: tuple[str, ...], number: int) -> KeptAdapter:
        """Add and return an adapter in state LOADING; commands from ``number`` on contain it."""
        adapter = AdapterRecord(key=f"{name}@{number}", name=name, path=path, tenants=tenants)
        kept = KeptAdapter(adapter=adapter, state=AdapterState.LOADING, number=number)
        self._put(kept)
        self.was_ordered = True
        return kept

    def enter(self, kept: KeptAdapter, state: AdapterState) -> None:
        """Change the state of an adapter. Raises ``IllegalTransitionError``."""
        self._put(replace(kept, state=next_state(kept.state, state)))

    def remove(self, key: str) -> None:
        """Remove the adapter with this key, which the workers free, from the table."""
        self.by_key = {k: kept for k, kept in self.by_key.items() if k != key}

    def compare_digests(self, digests: Mapping[str, str]) -> list[str]:
        """Record the digests of adapter files that a worker has read.

        Returns the keys of adapters for which other workers have read different files.
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
        """Record which adapters a worker could not load (``keys``).

        Returns the keys of the adapters for which this has changed.
        """
        changed = []
        for key, kept in list(self.by_key.items()):
            if (key in keys) != (worker in kept.lacking):
                others = tuple(name for name in kept.lacking if name != worker)
                self._put(replace(kept, lacking=(*others, worker) if key in keys else others))
                changed.append(key)
        return changed

    def to_list(self) -> list[dict[str, Any]]:
        """Return all adapters of the table as JSON-compatible data."""
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
