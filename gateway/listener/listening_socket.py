"""Sockets that listen, several on one port, and their end without a lost connection.

The kernel resets the connections that wait in the queue of a listening socket when it is closed,
also where another socket listens on the same port. So a socket first takes no new connections: a
filter drops the segments that open one, and clients send those again after a second, to another
socket of the port. What has begun before is accepted meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct

HANDSHAKE_S = 0.2
"""Time for a handshake that has begun to end, and for its connection to be accepted."""
_SO_ATTACH_FILTER = 26
_FLAGS_OFFSET = 13
"""Of a TCP header, which is what a filter of a TCP socket sees."""
_SYN = 0x02
_NO_SYN = b"".join(  # classic BPF: code, jump if true, jump if false, constant
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, _FLAGS_OFFSET),  # load a byte
        (0x45, 0, 1, _SYN),  # has it this bit?
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # pass whole
    )
)


def listen(host: str, port: int, *, is_shared: bool) -> socket.socket:
    """A socket that listens; ``is_shared`` lets others listen on the port. Raises ``OSError``."""
    is_ipv6 = ":" in host
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
        reuse_port=is_shared,
        dualstack_ipv6=is_ipv6,
    )


def refuse_new_connections(listener: socket.socket) -> None:
    """Drop the segments that open a connection; where filters do not exist nothing changes."""
    program = ctypes.create_string_buffer(_NO_SYN, len(_NO_SYN))
    fields = struct.pack("HP", len(_NO_SYN) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fields)
