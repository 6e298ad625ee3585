"""Limits on connections that follow from the limit on open files of this process."""

from __future__ import annotations

import contextlib
import logging
import resource
from typing import NamedTuple

logger = logging.getLogger(__name__)

NUM_FILES = 16_384
"""Number of open files that a gateway needs for 11,520 HTTP and 3,840 gRPC connections."""
_SPARE_FILES = 1024
"""Open files for other purposes: workers, the admin ports, TLS handshakes, the state folder."""


class ConnectionLimits(NamedTuple):
    """Maximum numbers of connections of one gateway replica."""

    http: int
    grpc: int


def connection_limits(num_files: int) -> ConnectionLimits:
    """Divide the open files of a process: three quarters for HTTP, a quarter for gRPC.

    ``_SPARE_FILES`` are left for other purposes, or half of the files if that is less.
    """
    num_connections = max(num_files - _SPARE_FILES, num_files // 2)
    grpc = num_connections // 4
    return ConnectionLimits(http=num_connections - grpc, grpc=grpc)


def raise_file_limit() -> ConnectionLimits:
    """Raise this process's limit on open files to ``NUM_FILES``, or to the hard limit if that is
    lower. Returns the limits on connections, which a warning states if they are lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < NUM_FILES:
        wanted = NUM_FILES if hard == resource.RLIM_INFINITY else min(NUM_FILES, hard)
        with contextlib.suppress(OSError, ValueError):  # the system may have a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    has_enough = soft == resource.RLIM_INFINITY or soft >= NUM_FILES
    limits = connection_limits(NUM_FILES if has_enough else soft)
    if not has_enough:
        logger.warning(
            "at most %d HTTP and %d gRPC connections can be open, because at most %d files can be "
            "open: raise the hard limit to %d",
            *(limits.http, limits.grpc, soft, NUM_FILES),
        )
    return limits
