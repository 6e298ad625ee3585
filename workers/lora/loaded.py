"""The LoRA adapters that an attention worker has loaded, by the key that requests contain."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from cluster.config.lora import LoraSection
from cluster.core.errors import CheckpointError
from workers.lora.adapters import AdapterWeights, BatchAdapters, PreparedAdapter, make, prepare
from workers.lora.catalog import targets_of
from workers.lora.folder import WEIGHTS_FILE, read_folder
from workers.lora.settings import CONFIG_FILE
from workers.model.layers import AttentionModel


class LoadedAdapters:
    """Loaded LoRA adapters of one model. Only the engine's thread calls it, except as noted."""

    def __init__(self, model: AttentionModel, section: LoraSection) -> None:
        self._model = model
        self._section = section
        self._adapters: dict[str, AdapterWeights] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the loaded adapters. Any thread may read this."""
        return tuple(self._adapters)

    @property
    def limit(self) -> int:
        """Maximum number of loaded adapters."""
        return self._section.max_loras

    @property
    def num_bytes(self) -> int:
        """Size of the matrices of all loaded adapters in bytes. Any thread may read this."""
        return sum(adapter.num_bytes for adapter in tuple(self._adapters.values()))

    def read(self, path: Path) -> PreparedAdapter:
        """Check and read an adapter folder. Any thread may call it. Raises ``CheckpointError``."""
        targets = targets_of(self._model.products)
        found = read_folder(path, targets, self._section.max_lora_rank)
        return prepare(found, self._model.dtype)

    def check_place(self, path: Path) -> None:
        """Raise ``CheckpointError`` if the folder or a file in it is, after symbolic links are
        followed, outside the folders permitted for adapters.

        Any thread may call it; it may wait for a disk.
        """
        if str(path) in {named for _, named in self._section.modules}:
            return  # configured at startup
        roots = [os.path.realpath(root) for root in self._section.roots]
        for place in (path, path / CONFIG_FILE, path / WEIGHTS_FILE):
            real = Path(os.path.realpath(place))  # Path.resolve raises for a loop of links
            if not any(map(real.is_relative_to, roots)):
                raise CheckpointError(f"{place} is not in a folder of --lora-roots")

    def build(self, key: str, prepared: PreparedAdapter) -> Generator[None, None, None]:
        """Make a prepared adapter ready for rows, with a ``yield`` after each short step.

        Raises ``CheckpointError`` if GPU memory does not suffice, the maximum number of adapters is
        loaded, or ``make`` raises it.
        """
        self._check_capacity(prepared)
        self._adapters[key] = yield from make(prepared, self._model)

    def remove(self, key: str) -> None:
        """Free an adapter's memory; do nothing if the adapter is not loaded."""
        self._adapters.pop(key, None)

    def batch(self, owners: Sequence[tuple[str, int]]) -> BatchAdapters | None:
        """Return the adapters of a micro-batch's rows, or None if no row has an adapter.

        ``owners``: adapter key (empty for no adapter) and number of rows for each run of
        consecutive rows.
        """
        if not any(key for key, _ in owners):
            return None
        found = [(self._adapters[key] if key else None, count) for key, count in owners]
        return BatchAdapters(found, self._model.device)

    def _check_capacity(self, prepared: PreparedAdapter) -> None:
        limit = self.limit
        if len(self._adapters) >= limit:
            raise CheckpointError(f"{limit} adapters are loaded, the maximum number (max_loras)")
        if self._model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._model.device)
            needed = prepared.num_bytes
            if needed > free:
                raise CheckpointError(
                    f"the adapter needs {needed} bytes of the GPU, but {free} are free"
                )
