"""Fingerprint of the arithmetic of this process, equal on machines that compute the same bits.

Workers of a deterministic cluster compare their fingerprints. If processors, builds of torch or (if
torch computes the products) numbers of threads differ, a request's bits may depend on the worker
that serves it. Names of processors do not prove equality, so results for fixed inputs are hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.layers import can_pack, gated_activation, rms_norm
from workers.model.torch_private import pack, packed_linear
from workers.native.library import Library
from workers.native.matrix import Matrix
from workers.native.thread_team import ThreadTeam

_SHAPES = ((96, 40), (520, 130))
"""(out, half of in) of the products in a fingerprint: the first is too small for oneDNN's packed
layout, the second is large enough."""
_NUM_ROWS = 12


def torch_digest(with_products: bool) -> str:
    """Return a fingerprint of torch's arithmetic: 8 hex digits of a hash of results for fixed
    inputs.

    ``with_products``: whether to include linear products; False if native kernels compute them.
    Takes some milliseconds.
    """
    return _digest(_torch_results(with_products))


def arithmetic_of(library: Library, dtype: torch.dtype) -> str:
    """Return the arithmetic of a library of native kernels: a name, and 8 hex digits of a hash of
    the kernels' results for fixed inputs.

    The name ``float32`` is the same for all instruction sets; ``bfloat16-fma`` sums like float32,
    and ``bfloat16-dot`` uses the processor's dot products, which round differently.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
        name += "-dot" if library.name == "avx512_bf16" else "-fma"
    return f"{name} {_digest(_native_results(library, dtype))}"


def _digest(results: Iterator[Tensor]) -> str:
    digest = hashlib.sha256()
    with torch.inference_mode():
        for result in results:
            digest.update(result.float().numpy().tobytes())
    return digest.hexdigest()[:8]


def _torch_results(with_products: bool) -> Iterator[Tensor]:
    """Yield the results of the torch operators that models use, for fixed inputs."""
    for dtype in (torch.float32, torch.bfloat16):
        for out, width in _SHAPES:
            weight, rows = _operands(out, width, dtype)
            if with_products:
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


def _native_results(library: Library, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the results of native matrix products for fixed inputs."""
    team = ThreadTeam(library, 1)
    for out, width in _SHAPES:
        weight, rows = _operands(out, width, dtype)
        yield Matrix(team, weight).multiply(rows)


def _operands(out: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a weight [out, 2 * width] and rows [_NUM_ROWS, 2 * width]; without rounding, their
    products would be 0.

    The second half of each sum subtracts the terms of the first half, so that only rounding errors
    remain.
    """
    weight, rows = _numbers(out, width).to(dtype), _numbers(_NUM_ROWS, width).to(dtype)
    return torch.cat((weight, weight), 1), torch.cat((rows, -rows), 1)


def _numbers(rows: int, columns: int) -> Tensor:
    """Return fixed inputs [rows, columns] float32: cubes of multiples of 2**-9 in [-1, 1).

    Sums of the cubes round; sums of the multiples themselves would be exact in any order.
    """
    places = torch.arange(rows * columns, dtype=torch.int64)
    numbers = (places * 40503 % 65521 % 1024 - 512).float() / 512
    return (numbers * numbers * numbers).view(rows, columns)
