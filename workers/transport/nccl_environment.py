"""Environment variables of torch's NCCL groups; this module does not import torch.

By default a watchdog thread of each group ends the process after a peer has died. Workers must
survive the death of a peer, so the variables disable the watchdog. torch reads some variables once
per process and others for each group (``torch/csrc/distributed/c10d``, ``ProcessGroupNCCL`` and
``NCCLUtils``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

CONNECT_LIMIT_S: Final = 60
"""Longest wait in seconds for an NCCL communicator to connect or to be aborted; such a wait cannot
be interrupted."""
NCCL_ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "NCCL_GRAPH_REGISTER": "0",  # else addresses of dropped CUDA graphs stay registered
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # errors end neither communicators nor the process
        "TORCH_NCCL_BLOCKING_WAIT": "0",  # ``wait`` only orders the stream
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",  # do not abort the process if its watchdog stalls
        "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(CONNECT_LIMIT_S),
        "TORCH_NCCL_PROPAGATE_ERROR": "0",  # the worker with the store may be dead
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",  # else a failed group is kept for a minute
    }
)


def set_nccl_environment() -> None:
    """Set the environment variables of NCCL in this process. Call it before torch is imported.

    Workers without a GPU are not affected.
    """
    os.environ.update(NCCL_ENVIRONMENT)
