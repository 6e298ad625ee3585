"""All uses of torch's private API. No other module names a private function of torch.

Private functions may change in any release, so only tested releases of torch are allowed, here and
in ``pyproject.toml``.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore, Work
from torch.nn import functional

__all__ = ["PrefixStore", "Store", "TCPStore", "Work"]  # for importers; the rest is defined here

_FIRST, _END = (2, 11), (2, 14)
"""First supported release, and the first later one that is not supported."""


def check_version(version: str) -> None:
    """Raise ``ImportError`` for a release of torch that was not tested."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if not _FIRST <= release < _END:
        first, end = (".".join(map(str, bound)) for bound in (_FIRST, _END))
        raise ImportError(
            f"torch {version} is not supported: must be at least {first} and below {end}"
        )


check_version(torch.__version__)


# oneDNN's weight layout, which some builds of torch lack

_HAS_ONEDNN: bool = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def supports_packing(weight: Tensor) -> bool:
    """Whether oneDNN has a packed layout for this weight on this machine."""
    if weight.device.type != "cpu" or not _HAS_ONEDNN:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """Return a copy of ``weight`` [out, in] in oneDNN's layout, only for ``packed_linear``,
    ``scriptable_packed_linear`` and ``unpack``."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Return the weight [out, in] that was packed, bit for bit, newly allocated."""
    return packed.to_dense()


# With its overload named, an operator releases the GIL.
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default if _HAS_ONEDNN else None


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [rows, in] times a weight that ``pack`` made, plus the bias: [rows, out]."""
    assert _linear_pointwise is not None, "nothing is packed without oneDNN"
    result: Tensor = _linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return result


scriptable_packed_linear: Callable[[Tensor, Tensor], Tensor] = (
    _packed_linear if _HAS_ONEDNN else functional.linear
)
"""``packed_linear`` without bias, for TorchScript. TorchScript cannot name an operator's overload,
and compiles this function even if no weight is packed."""


# Process groups without a global world

_NEVER = timedelta(days=1)
"""Timeout of NCCL's own watchdog, so long that it never acts: the transport has its own limits."""


def gloo_group(store: Store, rank: int, size: int, host: str, timeout_s: float) -> Any:
    """Return a connected gloo process group of ``size`` ranks, with sockets on the network
    interface of ``host``. All ranks must call it. ``timeout_s``: limit of each operation in
    seconds."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    return gloo(store, rank, size, options)


def nccl_group(store: Store, rank: int, size: int) -> Any:
    """Return an NCCL process group that is not yet connected; see ``connect_nccl_group``."""
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = _NEVER
    options.config.blocking = 0
    return nccl(store, rank, size, options)


def connect_nccl_group(group: Any, device: torch.device) -> None:
    """Start to connect an NCCL process group; its first operation waits until it is connected.

    All ranks must call it. Blocks until rank 0 has put the group's key into the store. Afterwards
    the group has a communicator, connected or not, that ``abort`` can end.
    """
    group.eager_connect_single_device(device)


def coalesced(group: Any, start: Callable[[], None]) -> Work:
    """Return one handle for all transfers that ``start`` begins on an NCCL group."""
    group._start_coalescing()
    try:
        start()
    finally:  # otherwise the next groups of this thread would stay open within this one
        work: Work = group._end_coalescing()
    return work


_SUCCESS = 0
"""``WorkResult.SUCCESS`` of torch."""


def has_failed(work: Work) -> bool:
    """Whether transfers have ended with an NCCL error; False while they run.

    To be called before ``Work.wait``, which after an error would abort only the communicator of
    ``work`` and might wait for kernels of other communicators. All communicators of a world must be
    aborted together.
    """
    result: Any = work.get_future_result()  # type: ignore[attr-defined]  # not in torch's stub
    return bool(result.done()) and result.value() != _SUCCESS
