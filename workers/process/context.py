"""Objects shared by the roles of one worker: checkpoint, kernels, connections, control side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.config.cluster import ClusterConfig
from cluster.config.model import Quantize
from cluster.core.checks import check
from cluster.core.frames import ControlFrame
from cluster.core.topology import Member
from workers.engine.group_channels import GroupChannels
from workers.engine.step_channel import StepChannel
from workers.experts.slots import torch_reason
from workers.metrics.activity import Activity
from workers.metrics.step_timer import StepTimer, TimingSink
from workers.model.compute_threads import ComputeThreads
from workers.model.families.base import Family
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.config_file import resolve_dtype
from workers.model.loading.expert_format import rounded_form
from workers.native.thread_team import Kernels
from workers.process.control.membership import Membership
from workers.process.exactness import Exactness
from workers.process.worker_args import WorkerArgs
from workers.quantization.formats import WeightFormat
from workers.transport.handshake import PeerIdentity
from workers.transport.peer_connections import PeerConnections
from workers.transport.peer_link import PeerEndpoint, PeerServer
from workers.transport.transport import DataTransport

Progress = Callable[[int, int], None]
"""Called while weights are loaded, with the bytes loaded so far and the total bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSetup:
    """The checkpoint of a worker, and the dtype, kernels and threads that compute with it."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    kernels: Kernels
    exactness: Exactness
    compute_threads: ComputeThreads
    quantize: Quantize
    """Expert quantization. ``auto`` becomes ``none`` on a worker without compiled kernels."""

    @classmethod
    def of(cls, args: WorkerArgs, kernels: Kernels, progress: Progress) -> ModelSetup:
        """Read the checkpoint's headers and choose the settings. Raises ``CheckpointError``."""
        section, device_type = args.config.model, args.device.type
        has_kernels = device_type == "cuda" or kernels.team is not None
        quantize = section.quantize if has_kernels or section.quantize != "auto" else "none"
        checkpoint = Checkpoint(
            Path(section.path),
            progress,
            quantize,
            has_predictor=args.config.speculation.has_predictor,
        )
        banks = checkpoint.family.banks
        dtype = resolve_dtype(section.dtype, checkpoint.family.config)
        exactness = Exactness.of(args, kernels, banks, dtype)
        if args.member.holds_experts:
            kernels = kernels.with_exception(torch_reason(banks, dtype))
        return cls(
            checkpoint=checkpoint,
            dtype=dtype,
            kernels=kernels,
            exactness=exactness,
            compute_threads=ComputeThreads.for_threads(exactness.torch_threads, device_type),
            quantize=quantize,
        )

    @property
    def family(self) -> Family:
        """The model family."""
        return self.checkpoint.family

    @property
    def dtype_name(self) -> str:
        """Name of the dtype without ``torch.``."""
        return str(self.dtype).removeprefix("torch.")

    def format_outside_experts(self, config: ClusterConfig) -> WeightFormat | None:
        """Weight format outside experts, None for the model dtype. Raises ``ConfigError``."""
        section = config.model
        if section.quantize_layers == "experts":
            return None
        has_kernels = self.kernels.team is not None
        rule = f"needs compiled kernels, this worker has {self.kernels.description}"
        check(has_kernels, "quantize_layers", section.quantize_layers, rule)
        return rounded_form(section.quantize, ())


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerContext:
    """Objects that the roles of one worker share; connections and listeners are open already."""

    args: WorkerArgs
    member: Member
    """This worker's member record, before the addresses of its roles' listeners are known."""
    me: PeerIdentity
    model: ModelSetup
    membership: Membership
    send: Callable[[ControlFrame], None]
    """Sends a control frame to the controller."""
    contact_at: Callable[[], float]
    """Returns the monotonic time of the newest acknowledged heartbeat."""
    connections: PeerConnections
    channel: StepChannel
    """Step channel; on an expert worker, the channel of the first step group."""
    transport: DataTransport
    group_channels: GroupChannels | None = None
    """On an expert worker of several step groups, the channels of all; else None."""
    group_transports: Sequence[DataTransport] = ()
    """On an expert worker, the transports of the step groups after the first."""
    activity: Activity
    timing_sinks: Sequence[TimingSink]
    cleanup: ExitStack
    """Closed when the worker ends; data thread only."""

    @property
    def config(self) -> ClusterConfig:
        """The cluster's configuration."""
        return self.args.config

    @property
    def family(self) -> Family:
        """The model family."""
        return self.model.family

    def new_timer(self) -> StepTimer:
        """Create a step timer that reports to the metrics and traces of this worker."""
        return StepTimer(*self.timing_sinks)

    def fork_timer(self) -> StepTimer:
        """Return a timer of steps that run between those of ``new_timer``."""
        return StepTimer(*(sink.fork() for sink in self.timing_sinks))

    def kv_peer(self, name: str) -> PeerEndpoint | None:
        """Address of another worker's KV server; None if this generation has no such worker."""
        members = self.membership.generation.members
        member = next((m for m in members if m.name == name), None)
        if member is None or not member.kv_address or name == self.member.name:
            return None
        token = self.config.cluster_token
        return PeerEndpoint(name=name, address=member.kv_address, me=self.me, token=token)

    def open_peer_server(self, what: str, key_bytes: int) -> PeerServer:
        """Open a ``PeerServer`` for fetches by other workers. It closes when this worker ends."""
        token, host = self.config.cluster_token, self.args.host
        server = PeerServer(self.me, token, host=host, what=what, key_bytes=key_bytes)
        self.cleanup.callback(server.close)
        return server
