"""The toy's adapters: a number that each row of a request with one adds to its state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.simulation.kernel import Kernel
from workers.lora.loaded import LoadedAdapters

ADAPTERS = {"sql": "/adapters/sql", "chat": "/adapters/chat"}
"""Folders by name."""
_READ_S = 0.02
"""Longest time to read one."""


def adapter_value(name: str) -> int:
    """What an adapter adds; 0: none is named."""
    return int.from_bytes(name.encode())


@dataclass(frozen=True, slots=True)
class _ToyAdapter:
    digest: str
    value: int
    num_bytes: int = 1


class ToyAdapters(LoadedAdapters):
    """In place of ``LoadedAdapters``."""

    def read(self, path: Path) -> Any:
        kernel = Kernel.current
        assert kernel is not None
        kernel.sleep(kernel.rng.random() * _READ_S)
        return _ToyAdapter(digest=str(path), value=adapter_value(path.name))

    def build(self, key: str, prepared: Any) -> Iterator[None]:  # type: ignore[override]
        self._check_capacity(prepared)
        yield
        self._adapters[key] = prepared

    def value(self, key: str) -> tuple[int, ...]:
        """What rows with this adapter add to the contents of their experts."""
        found: Any = self._adapters[key] if key else None
        return () if found is None else (found.value,)
