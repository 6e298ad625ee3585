"""Limits on connections that follow from the limit on open files of this process."""

from __future__ import annotations

import logging
import resource
from typing import NamedTuple

logger = logging.getLogger(__name__)

NUM_FILES = 16_384
"""Number of open files that a gateway needs for 12,288 HTTP and 3,584 gRPC connections."""
_SPARE_FILES = 512
"""Open files for everything except connections of clients: workers, threads, the state folder."""


class ConnectionLimits(NamedTuple):
    """Maximum numbers of connections of one gateway replica."""

    http: int
    grpc: int


def connection_limits(num_files: int) -> ConnectionLimits:
    """Divide the open files of a process: three quarters for HTTP, the rest for gRPC and others."""
    grpc = max(num_files // 4 - _SPARE_FILES, num_files // 16)
    return ConnectionLimits(http=num_files * 3 // 4, grpc=grpc)


def raise_file_limit() -> ConnectionLimits:
    """Raise this process's limit on open files to ``NUM_FILES``, or to the hard limit if that is
    lower. Returns the limits on connections, which a warning states if they are lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < NUM_FILES:
        soft = NUM_FILES if hard == resource.RLIM_INFINITY else min(NUM_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    has_enough = soft == resource.RLIM_INFINITY or soft >= NUM_FILES
    limits = connection_limits(NUM_FILES if has_enough else soft)
    if not has_enough:
        logger.warning(
            "at most %d HTTP and %d gRPC connections can be open, because the hard limit on open "
            "files is %d: raise it to %d",
            *(limits.http, limits.grpc, soft, NUM_FILES),
        )
    return limits
