"""A network that loses everything in one direction of one connection, and closes nothing."""

from __future__ import annotations

import ctypes
import socket
import struct

_SO_ATTACH_FILTER = 26
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)
"""The socket filter ``ret #0``: the kernel takes no packet, so that nothing is acknowledged."""


def lose_all_to(receiver: socket.socket) -> None:
    """Packets to this end of a connection, or to a listener, are lost from now on."""
    program = ctypes.create_string_buffer(_DROP_ALL)
    receiver.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program))
    )
