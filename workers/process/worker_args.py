"""The arguments of a worker, built from plain data of ``cluster.actors.worker_group``."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.config.cluster import ClusterConfig
from cluster.core.codec import from_plain
from cluster.core.holders import ExpertHolder
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Member
from workers.model.cuda.device import gpu_facts


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerArgs:
    """Configuration, identity, addresses and CPU threads of one worker."""

    config: ClusterConfig
    """The cluster's configuration, with the device and each worker's CPU and GPU share resolved."""
    member: Member
    control_address: str
    """``host:port`` of the controller's control server."""
    host: str
    """Interface that this worker's sockets bind to."""
    threads: int = 1
    placement: ExpertPlacement | None = None
    """First placement; None if this worker holds no experts."""
    num_slots: int = 0
    """Expert slots per bank; 0 if this worker holds no experts."""
    holders: tuple[ExpertHolder, ...] = ()
    """Running workers that hold some of these experts; empty at the start of a cluster."""

    @classmethod
    def from_plain(
        cls,
        config: Mapping[str, Any],
        member: Mapping[str, Any],
        control_address: str,
        extra: Mapping[str, Any],
        host: str,
    ) -> WorkerArgs:
        """Build from the actor's constructor arguments. Raises ``ConfigError``."""
        placement = extra.get("placement")
        return cls(
            config=ClusterConfig.from_dict(config),
            member=from_plain(member, Member),
            control_address=control_address,
            host=host,
            threads=int(extra.get("threads", 1)),
            placement=None if placement is None else ExpertPlacement.from_dict(placement),
            num_slots=int(extra.get("num_slots", 0)),
            holders=from_plain(extra.get("holders", ()), tuple[ExpertHolder, ...]),
        )

    @property
    def torch_reason(self) -> str:
        """Why this worker must not use compiled kernels; empty if it may."""
        if self.config.workers.kernels == "torch":
            return "as configured"
        return "on CUDA" if self.config.workers.device == "cuda" else ""

    @property
    def device(self) -> torch.device:
        """Device of this worker: the CPU, or the first visible GPU (Ray shows only its own)."""
        return torch.device("cuda:0" if self.config.workers.device == "cuda" else "cpu")

    @property
    def device_facts(self) -> dict[str, Any]:
        """Facts for ``Register``: host and device; for a GPU also its type and bandwidth."""
        facts: dict[str, Any] = {"host": socket.gethostname(), "device": str(self.device)}
        if self.device.type == "cuda":
            facts["gpu"], facts["gpu_bandwidth_bytes_s"] = gpu_facts(self.device)
        return facts
