"""Confirms a step's outputs, which a worker over NCCL may have computed from rows that never came.

The host of an expert rank does not wait for rows before it launches the kernels that compute and
send outputs. If it loses a peer, it aborts the communicators; a receive then ends without data, and
the outputs that follow may still reach other attention ranks. So an attention rank commits a step
only when all expert ranks have confirmed, on the connections between hosts, that all rows arrived.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from workers.requests.step_header import StepHeader
from workers.transport.frames import FrameHeader, FrameKind
from workers.transport.peer_connections import PeerConnections


class StepConfirmations:
    """Sends and awaits the confirmations of one worker. Data thread only."""

    def __init__(self, connections: PeerConnections) -> None:
        self._connections = connections

    def send(self, header: StepHeader, names: Mapping[int, str]) -> None:
        """Confirm a step to the attention ranks that sent rows. ``names``: peers by rank.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        for rank, count in zip(header.grants.positions, header.edge_counts(0), strict=True):
            if count and names[rank] != self._connections.me.name:
                self._connections.send(names[rank], _frame(header), ())

    def wait(self, header: StepHeader, names: Mapping[int, str]) -> None:
        """Wait for the confirmations of all expert ranks. ``names``: peers by rank.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        connections = self._connections
        deadline = time.monotonic() + connections.step_timeout_s
        others = [name for name in names.values() if name != connections.me.name]
        for i, name in enumerate(others):
            connections.receive(name, _frame(header), deadline, others[i + 1 :])


def _frame(header: StepHeader) -> FrameHeader:
    """Return the frame that confirms a step: outputs without rows."""
    return FrameHeader(FrameKind.OUTPUTS, header.generation, header.step)
