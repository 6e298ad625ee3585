"""A short hash of how this process computes, equal on machines that give the same bits.

Workers of a deterministic cluster compare it in their handshake: with other processors, builds of
torch or numbers of threads, a request's bits would depend on the worker that serves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.layers import can_pack, gated_activation, rms_norm
from workers.model.torch_private import pack, packed_linear

_SHAPES = ((96, 80), (520, 260))
"""[out, in] of products: too small and large enough for packing."""
_NUM_ROWS = 12


def numerics_digest() -> str:
    """12 hex digits. Takes some milliseconds."""
    digest = hashlib.sha256()
    with torch.inference_mode():
        for result in _results():
            digest.update(result.float().numpy().tobytes())
    return digest.hexdigest()[:12]


def _results() -> Iterator[Tensor]:
    """Outputs of the building blocks for fixed inputs."""
    for dtype in (torch.float32, torch.bfloat16):
        for out, width in _SHAPES:
            weight, rows = _numbers(out, width).to(dtype), _numbers(_NUM_ROWS, width).to(dtype)
            yield functional.linear(rows, weight)
            if can_pack(weight):
                yield packed_linear(rows, pack(weight))
            yield torch.bmm(rows.unsqueeze(0), weight.t().unsqueeze(0))
            yield rms_norm(rows.clone(), weight[0], 1e-5)
            yield gated_activation("silu")(rows)
            yield torch.softmax(rows, -1, dtype=torch.float32)
            yield rows.float().logsumexp(-1)
            yield rows.float().exp()
            yield rows.float().cos()


def _numbers(rows: int, columns: int) -> Tensor:
    """[rows, columns] float32, the same on every machine: exact multiples of 2**-9 in [-1, 1)."""
    places = torch.arange(rows * columns, dtype=torch.int64)
    return ((places * 40503 % 65521 % 1024 - 512).float() / 512).view(rows, columns)
