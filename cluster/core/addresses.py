"""Addresses as text: ``host:port``, with an IPv6 host in brackets."""

from __future__ import annotations

import contextlib
import socket

_TCP_THIN_LINEAR_TIMEOUTS = 16
_TCP_RTO_MAX_MS = 44
_GIVE_UP_MS = 60_000


def split_address(address: str) -> tuple[str, int]:
    """Split an address into its host, without brackets, and its port. Raises ``ValueError``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def tune_socket(sock: socket.socket) -> None:
    """Set socket options so that small frames are sent at once, and soon after a network outage.

    By default Linux doubles the pause between retransmissions, up to minutes. With these options
    Linux retries at least every second (from Linux 6.15), or else six times without doubling the
    pause.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GIVE_UP_MS)
    for option, value in ((_TCP_THIN_LINEAR_TIMEOUTS, 1), (_TCP_RTO_MAX_MS, 1000)):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
