"""What a start comes to: placement, shares of resources, slots, and what each worker is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.placement import BankShape, ExpertPlacement, contiguous, load_placement
from cluster.resources import NodeResources, WorkerShare, plan_shares
from cluster.topology import Member


@dataclass(frozen=True, kw_only=True, slots=True)
class StartPlan:
    """Everything that is decided before the first worker is created."""

    config: ClusterConfig
    """As given, with device and shares resolved: what the workers get."""
    placement: ExpertPlacement
    """First placement."""
    share: WorkerShare
    """Resources of each worker."""
    num_slots: int
    """Expert slots per bank of each expert worker: the fullest planned one and the spare ones."""

    def extra(self, member: Member) -> dict[str, Any]:
        """What a worker is told besides the configuration."""
        extra: dict[str, Any] = {"threads": self.share.threads}
        if member.holds_experts or self.config.workers.mode == "local":
            extra |= {"placement": self.placement.to_dict(), "num_slots": self.num_slots}
        return extra


def plan_start(
    config: ClusterConfig,
    banks: Sequence[Mapping[str, Any]],
    nodes: Sequence[NodeResources],
    free_cpus: float | None = None,
) -> StartPlan:
    """Decide the start; ``banks`` are dicts with ``bank``, ``layer`` and ``num_experts``.

    Raises ``ConfigError`` for what the model or the nodes cannot do. Nothing is created.
    """
    assert config.workers.mode != "auto", "the mode is decided before the start"
    shapes = [
        BankShape(bank=str(b["bank"]), layer=int(b["layer"]), num_experts=int(b["num_experts"]))
        for b in banks
    ]
    placement = first_placement(config, shapes)
    share = plan_shares(config.workers, nodes, free_cpus)
    slots = max((len(s) for b in placement.banks for s in b.physical_to_logical), default=0)
    return StartPlan(
        config=_resolved(config, share),
        placement=placement,
        share=share,
        num_slots=slots + config.workers.recovery_slots,
    )


def first_placement(config: ClusterConfig, shapes: Sequence[BankShape]) -> ExpertPlacement:
    """The placement file's, or the contiguous one. Local mode has one device.

    Raises ``ConfigError``.
    """
    workers = config.workers
    if workers.mode == "local":
        return contiguous(shapes, 1)
    if workers.placement_file is not None:
        return load_placement(Path(workers.placement_file), shapes, workers.num_expert_workers)
    return contiguous(shapes, workers.num_expert_workers, workers.num_redundant_experts)


def _resolved(config: ClusterConfig, share: WorkerShare) -> ClusterConfig:
    workers = replace(
        config.workers,
        device=share.device,
        cpus_per_worker=share.cpus or None,
        gpus_per_worker=share.gpus,
    )
    return replace(config, workers=workers)
