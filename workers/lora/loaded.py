"""The adapters that an attention worker has, by the key that requests name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cluster.config.lora import LoraSection
from cluster.core.errors import CheckpointError
from workers.lora.adapters import Adapter, AdapterMaker, BatchAdapters
from workers.lora.folder import AdapterFolder, read_folder
from workers.model.layers import AttentionModel


class LoadedAdapters:
    """Adapters of one model. All methods but ``read`` belong to the engine's thread."""

    def __init__(self, model: AttentionModel, section: LoraSection) -> None:
        self._maker = AdapterMaker(model)
        self._device = model.device
        self._section = section
        self._adapters: dict[str, Adapter] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def num_bytes(self) -> int:
        """Of the matrices of all adapters."""
        return sum(adapter.num_bytes for adapter in tuple(self._adapters.values()))

    def read(self, path: Path) -> AdapterFolder:
        """Check and read a folder. Any thread; raises ``CheckpointError``."""
        return read_folder(path, self._maker.targets, self._section.max_lora_rank)

    @torch.inference_mode()
    def put(self, key: str, folder: AdapterFolder) -> None:
        """Make an adapter ready for rows. Raises ``CheckpointError`` where there is no room."""
        if key in self._adapters:
            return
        limit = self._section.max_loras
        if len(self._adapters) >= limit:
            raise CheckpointError(
                f"{limit} adapters are loaded, at most {limit} (max_loras) may be"
            )
        needed = self._maker.num_bytes(folder)
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            if 2 * needed > free:  # it is copied once
                raise CheckpointError(
                    f"the adapter needs {2 * needed} bytes of the GPU while it is loaded, and "
                    f"{free} are free"
                )
        self._adapters[key] = self._maker.make(folder)

    def remove(self, key: str) -> None:
        """Give an adapter's memory back, if it is loaded."""
        self._adapters.pop(key, None)

    def batch(self, owners: Sequence[tuple[str, int]]) -> BatchAdapters | None:
        """``RowAdapters`` of rows, one after the other: the key of so many, empty for none.

        None: none has an adapter.
        """
        if not any(key for key, _ in owners):
            return None
        found = [(self._adapters[key] if key else None, count) for key, count in owners]
        return BatchAdapters(found, self._device)
