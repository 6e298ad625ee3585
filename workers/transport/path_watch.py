"""Detection of dead network paths: bytes that the peer's kernel does not acknowledge.

A peer that computes reads nothing, but its kernel acknowledges arriving bytes. So unacknowledged
bytes indicate a broken path, never a busy peer. No pings are needed: if a worker waits for a peer
in a step, this worker or another waiting worker has sent the peer a frame.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import NamedTuple

LOOK_S = 0.25
"""Seconds between two checks of an edge for unacknowledged bytes."""
_MIN_RETRANSMITS = 3
"""Minimum number of retransmits before a path counts as dead. A host that was paused has sent none,
so that its peers do not seem dead."""
_INFO_BYTES = 128


class PathState(NamedTuple):
    """Kernel state of one TCP connection."""

    retransmits: int
    """Number of consecutive retransmission timeouts without an acknowledgement."""
    unacknowledged: int
    """Number of segments that were sent but not acknowledged; 0 also if the peer's buffers are full
    and nothing can be sent."""
    acknowledged_bytes: int


def path_state(sock: socket.socket) -> PathState | None:
    """Return the state of a TCP connection, or None if the system does not report it.

    Source: ``struct tcp_info`` in ``include/uapi/linux/tcp.h``, which has stable field offsets.
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
    """Detects that the network path of one TCP connection is dead: no byte is acknowledged.

    Pure: the state of the connection and the monotonic time are arguments.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._stuck: tuple[int, float] | None = None

    def look(self, state: PathState, now: float) -> str | None:
        """Check the state of the connection at monotonic time ``now``.

        Returns the reason if the path is dead (no acknowledgement within the limit), else None.
        """
        if not state.unacknowledged:
            self._stuck = None
        elif self._stuck is None or self._stuck[0] != state.acknowledged_bytes:
            self._stuck = state.acknowledged_bytes, now
        elif state.retransmits >= _MIN_RETRANSMITS and now - self._stuck[1] >= self._limit_s:
            return f"no acknowledgement for {now - self._stuck[1]:.1f} s"
        return None

    @property
    def is_settled(self) -> bool:
        """Whether all sent bytes were acknowledged at the latest call of ``look``."""
        return self._stuck is None
