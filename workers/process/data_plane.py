"""A worker's side of the data plane: identity, sockets, transport."""

from __future__ import annotations

from typing import get_args

import torch

from cluster.config.cluster import CombineMode
from workers.model.loading.checkpoint import Checkpoint
from workers.process.worker_args import WorkerArgs
from workers.transport.collective import CollectiveTransport
from workers.transport.frames import max_data_bytes
from workers.transport.handshake import PeerIdentity
from workers.transport.peer_connections import PeerConnections
from workers.transport.sockets import SocketTransport

IDLE_WAIT_S = 1.0
"""Longest wait of the idle data thread."""


class StepInterrupts:
    """Interrupts waits of the data thread for peers, once connections are open. Any thread."""

    def __init__(self) -> None:
        self._connections: PeerConnections | None = None

    def attach(self, connections: PeerConnections) -> None:
        """Set the open connections. Calls of other methods before this one have no effect."""
        self._connections = connections

    def wake(self) -> None:
        """End a wait for the next step."""
        if self._connections is not None:
            self._connections.wake()

    def interrupt(self, generation: int) -> None:
        """Interrupt the running step, because generation number ``generation`` will follow."""
        if self._connections is not None:
            self._connections.interrupt(generation)

    def end_generations(self, fence: int) -> None:
        """Interrupt the steps of all generations up to ``fence``."""
        if self._connections is not None:
            self._connections.leave(fence)

    def awaited_peers(self) -> tuple[str, ...]:
        """Names of the peers that the data thread waits for."""
        return () if self._connections is None else self._connections.loop.awaited


def make_identity(args: WorkerArgs, checkpoint: Checkpoint) -> PeerIdentity:
    """Identity of this worker for handshakes."""
    return PeerIdentity(
        name=args.member.name,
        role=args.member.role,
        rank=args.member.rank,
        checkpoint_id=checkpoint.checkpoint_id,
        config_hash=args.config.fingerprint(),
        kv_cache_dtype=args.config.engine.kv_cache_dtype,
        expert_form=expert_form(checkpoint),
    )


def expert_form(checkpoint: Checkpoint) -> str:
    """Description of the expert quantization formats; empty for the model dtype."""
    forms = {e.form for bank in checkpoint.family.banks for e in bank.exchanges} - {None}
    return ", ".join(sorted(map(str, forms)))


def open_connections(
    args: WorkerArgs, me: PeerIdentity, checkpoint: Checkpoint, dtype: torch.dtype
) -> PeerConnections:
    """Open the data-plane sockets. The frame size limit fits the largest possible step."""
    engine, transport = args.config.engine, args.config.transport
    return PeerConnections(
        me,
        args.config.cluster_token,
        max_data_bytes=max(
            max_data_bytes(checkpoint.family.banks, engine.step_tokens, dtype.itemsize, mode)
            for mode in get_args(CombineMode)
        ),
        host=args.host,
        connect_timeout_s=transport.connect_timeout_s,
        step_timeout_s=transport.step_timeout_s,
        path_limit_s=transport.detection_limit_s,
        num_threads=args.threads,
    )


def open_transport(
    args: WorkerArgs, connections: PeerConnections, group: int = 0
) -> SocketTransport | CollectiveTransport:
    """Open the configured transport, or the default one for the workers' GPUs.

    ``group``: on an expert worker, the index of the step group that uses it.
    """
    if not args.config.is_collective:
        return SocketTransport(
            connections,
            combine_mode=args.config.engine.combine_mode,
            device=args.device,
            group=group,
        )
    return CollectiveTransport(
        connections,
        backend="nccl" if args.device.type == "cuda" else "gloo",
        device=args.device,
        host=args.host,
        connect_timeout_s=args.config.transport.connect_timeout_s,
    )
