"""What joins a worker to the other workers: its identity there, its sockets, its transport."""

from __future__ import annotations

import torch

from workers.checkpoint import Checkpoint
from workers.dist.collective import CollectiveTransport
from workers.dist.frames import max_data_bytes
from workers.dist.handshake import PeerIdentity
from workers.dist.hub import PeerHub
from workers.dist.sockets import SocketTransport
from workers.numerics import numerics_digest
from workers.worker_args import WorkerArgs


def identify(args: WorkerArgs, checkpoint: Checkpoint) -> PeerIdentity:
    """What this worker shows of itself in a handshake."""
    return PeerIdentity(
        name=args.member.name,
        role=args.member.role,
        rank=args.member.rank,
        checkpoint_id=checkpoint.checkpoint_id,
        config_hash=args.config.fingerprint(),
        numerics=numerics_digest() if args.config.engine.deterministic else "",
    )


def open_hub(
    args: WorkerArgs, me: PeerIdentity, checkpoint: Checkpoint, dtype: torch.dtype
) -> PeerHub:
    """The worker's data-plane sockets, which take frames as large as its steps can have."""
    engine, transport = args.config.engine, args.config.transport
    return PeerHub(
        me,
        args.config.cluster_token,
        max_data_bytes=max_data_bytes(
            checkpoint.family.banks,
            engine.max_num_batched_tokens,
            dtype.itemsize,
            engine.combine_mode,
        ),
        host=args.host,
        connect_timeout_s=transport.connect_timeout_s,
        step_timeout_s=transport.step_timeout_s,
    )


def open_transport(args: WorkerArgs, hub: PeerHub) -> SocketTransport | CollectiveTransport:
    """The transport that the configuration names; ``auto`` is collective on CUDA."""
    kind = args.config.transport.transport
    if kind == "sockets" or (kind == "auto" and args.device.type == "cpu"):
        return SocketTransport(
            hub, combine_mode=args.config.engine.combine_mode, device=args.device
        )
    return CollectiveTransport(
        hub,
        backend="nccl" if args.device.type == "cuda" else "gloo",
        device=args.device,
        host=args.host,
        connect_timeout_s=args.config.transport.connect_timeout_s,
    )
