"""Copies between the host and a device for which neither waits longer than it must.

On a CPU there is nothing to copy. To a GPU, a copy is put in the order of the stream: memory of the
host that is not pinned was read when the call returns. From a GPU, tensors come in one copy, which
is the one place where a step waits for its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any] | Sequence[int], device: torch.device) -> Tensor:
    """An array, or whole numbers as int64, on the device; on a CPU an array shares its memory."""
    array = values if isinstance(values, np.ndarray) else np.array(values, dtype=np.int64)
    return torch.from_numpy(array).to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Tensors of one device as arrays, in one copy; not bfloat16, which numpy does not have."""
    if tensors[0].is_cpu:
        return [tensor.numpy() for tensor in tensors]
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    data = torch.cat(parts).cpu().numpy().tobytes()  # device-to-host sync
    found, first = [], 0
    for tensor, part in zip(tensors, parts, strict=True):
        kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        own = np.frombuffer(data, dtype=kind, count=tensor.numel(), offset=first)
        found.append(own.reshape(tensor.shape))
        first += len(part)
    return found


def to_host_later(tensor: Tensor) -> Tensor:
    """A copy in memory of the host: whole once the host has waited for something that the device
    was given afterwards."""
    return tensor.to("cpu", non_blocking=True)  # torch pins the memory
