"""Listening sockets that share a port, and that can be closed without losing a connection.

When a listening socket is closed, the kernel resets the connections in its queue, even if another
socket listens on the port. Therefore a filter first drops the segments that open connections.
Clients repeat them after a second, and another socket of the port gets them. Handshakes that began
before the filter are completed and accepted.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct

HANDSHAKE_S = 0.2
"""Seconds until handshakes in progress are complete and their connections are accepted."""
_SO_ATTACH_FILTER = 26
_FLAGS_OFFSET = 13
"""Offset of the flags in the TCP header, with which the input of a TCP socket's filter begins."""
_SYN = 0x02
_NO_SYN = b"".join(  # classic BPF: code, jump if true, jump if false, constant
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, _FLAGS_OFFSET),  # load a byte
        (0x45, 0, 1, _SYN),  # test this bit
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # pass the whole segment
    )
)


def listen(host: str, port: int, *, is_shared: bool) -> socket.socket:
    """Make a listening socket, whose port others may share if ``is_shared``. Raises ``OSError``."""
    is_ipv6 = ":" in host
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
        reuse_port=is_shared,
        dualstack_ipv6=is_ipv6,
    )


def refuse_new_connections(listener: socket.socket) -> None:
    """Drop segments that open connections. No effect if the system has no socket filters."""
    program = ctypes.create_string_buffer(_NO_SYN, len(_NO_SYN))
    fields = struct.pack("HP", len(_NO_SYN) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fields)
