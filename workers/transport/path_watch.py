"""Dead paths between two hosts: bytes that the peer's kernel does not acknowledge.

A peer that computes reads nothing, but its kernel acknowledges what arrives, so unacknowledged
bytes show a broken path and never a busy peer. Whoever waits for a peer in a step has sent it a
frame, or somebody else has and waits, too; so no extra pings are needed, in either direction.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import NamedTuple

LOOK_S = 0.25
"""Time between two looks at an edge."""
_MIN_RETRANSMITS = 3
"""A pause of this whole host, in which no timer ran, is no silence of the peer."""
_INFO_BYTES = 128


class PathState(NamedTuple):
    """What the kernel knows of one TCP connection."""

    retransmits: int
    """Time-outs in a row without an acknowledgement."""
    unacknowledged: int
    """Segments under way. A peer whose buffers are full has none."""
    acknowledged_bytes: int


def path_state(sock: socket.socket) -> PathState | None:
    """The state of a TCP connection; None where the system does not tell.

    Source: ``struct tcp_info`` in ``include/uapi/linux/tcp.h``, whose fields keep their places.
    """
    if sys.platform != "linux":
        return None
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _INFO_BYTES:
        return None
    unacknowledged: int = struct.unpack_from("I", info, 24)[0]
    acknowledged: int = struct.unpack_from("Q", info, 120)[0]
    return PathState(info[2], unacknowledged, acknowledged)


class PathWatch:
    """Looks at one connection now and then. Pure: state and monotonic time are passed in."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._stuck: tuple[int, float] | None = None

    def look(self, state: PathState, now: float) -> str | None:
        """Why the path is dead, if it is: nothing was acknowledged for longer than the limit."""
        if not state.unacknowledged:
            self._stuck = None
        elif self._stuck is None or self._stuck[0] != state.acknowledged_bytes:
            self._stuck = state.acknowledged_bytes, now
        elif state.retransmits >= _MIN_RETRANSMITS and now - self._stuck[1] >= self._limit_s:
            return f"no acknowledgement for {now - self._stuck[1]:.1f} s"
        return None

    @property
    def is_settled(self) -> bool:
        """All bytes were acknowledged at the last look."""
        return self._stuck is None
