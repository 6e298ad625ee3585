"""Copies between host and device with a minimum of waiting.

On a CPU nothing is copied. Copies to a GPU are enqueued on the stream; when the call returns,
unpinned host memory has been read and may change. ``to_host`` copies several tensors of a GPU in
one copy, so that a step waits for its device only once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any] | Sequence[int], device: torch.device) -> Tensor:
    """Copy an array, or a sequence of integers as int64, to the device. On a CPU, the tensor shares
    the memory of the array."""
    array = values if isinstance(values, np.ndarray) else np.array(values, dtype=np.int64)
    return torch.from_numpy(array).to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Return tensors of one device as arrays, with a single copy from device to host; on a CPU the
    arrays share the tensors' memory. NumPy has no bfloat16, so no tensor may have this dtype."""
    if tensors[0].is_cpu:
        return [tensor.numpy() for tensor in tensors]
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    data = joined.cpu().numpy().tobytes()  # device-to-host sync
    found, first = [], 0
    for tensor, part in zip(tensors, parts, strict=True):
        kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        own = np.frombuffer(data, dtype=kind, count=tensor.numel(), offset=first)
        found.append(own.reshape(tensor.shape))
        first += len(part)
    return found


def to_host_later(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory asynchronously. The result is valid once the host has waited for
    any work that was enqueued on the device after this call."""
    return tensor.to("cpu", non_blocking=True)  # torch pins the memory
