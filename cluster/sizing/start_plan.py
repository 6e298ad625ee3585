"""Plans a start: placement, resources, expert slots, and the arguments of each worker.

``ExistingWorker`` describes a running worker for a restarted controller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config.cluster import ClusterConfig
from cluster.config.resources import NodeResources, WorkerShare, plan_shares, resolved_share
from cluster.config.workers import WorkersSection
from cluster.core.checks import check
from cluster.core.codec import to_plain
from cluster.core.holders import ExpertHolder
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.node_labels import ROLE
from cluster.core.placement import BankShape, ExpertPlacement, contiguous
from cluster.core.placement_file import load_placement
from cluster.core.topology import Member
from cluster.planner import mesh
from cluster.planner.base import PlannedDevice, PlannedTopology, planned_device
from cluster.planner.groups import plan_groups

WorkerArguments = tuple[dict[str, Any], dict[str, Any], str, dict[str, Any]]
"""Constructor arguments of a worker actor: config, member, controller address, other arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExistingWorker:
    """A running worker that an earlier controller started."""

    name: str
    config: ClusterConfig
    """The cluster's configuration with resolved shares."""
    num_slots: int
    """Number of expert slots per bank; 0 if the worker holds no experts."""
    has_connected: bool = True
    """Whether the worker has connected to a controller, and so may have been in a generation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartPlan:
    """Everything that is decided before the first worker is created."""

    config: ClusterConfig
    """The configuration for the workers, with resolved device and shares."""
    placement: ExpertPlacement
    num_slots: int
    """Expert slots per bank of an expert worker: the most in ``placement``, plus recovery slots."""
    load: LoadProfile | None = None
    """Expected load of the experts; None if the workers are running already."""
    holders: tuple[ExpertHolder, ...] = ()
    """Serving workers that hold experts of a new worker, which it can copy from their memory."""

    @property
    def share(self) -> WorkerShare:
        """Resources of each worker."""
        return resolved_share(self.config.workers)

    def with_members(self, members: Sequence[Member]) -> StartPlan:
        """Return the plan with a placement for ``members``, now that their nodes are known."""
        holders = sorted((m for m in members if m.holds_experts), key=lambda m: m.device)
        devices = [planned_device(self.config.workers.with_group(m)) for m in holders]
        if not devices or self.load is None:
            return self
        return replace(self, placement=first_placement(self.config, self.load, devices))

    def arguments(self, member: Member, control_address: str) -> WorkerArguments:
        """Return the constructor arguments of the actor of a worker."""
        extra: dict[str, Any] = {"threads": self.share.threads}
        if member.holds_experts or self.config.workers.mode == "local":
            extra |= {"placement": self.placement.to_dict(), "num_slots": self.num_slots}
            extra["holders"] = to_plain(self.holders)
        return self.config.to_dict(), to_plain(member), control_address, extra


def plan_start(
    config: ClusterConfig,
    banks: Sequence[Mapping[str, Any]],
    nodes: Sequence[NodeResources],
    free_cpus: float | None = None,
    profile: Mapping[str, Any] | None = None,
) -> StartPlan:
    """Plan the start of a cluster; creates nothing.

    ``banks`` are dicts with ``bank``, ``layer`` and ``num_experts``. ``profile`` is the expected
    load. ``free_cpus``: number of CPUs that other users of Ray leave free; None without other
    users. Nodes of workers are decided later: ``StartPlan.with_members``. Raises ``ConfigError``
    for options that the model or nodes cannot satisfy.
    """
    assert config.workers.mode != "auto", "the mode is decided before the start"
    _check_labels(config, nodes)
    expected = expected_load(config, banks, profile)
    share = plan_shares(config.workers, nodes, free_cpus)
    somewhere = [planned_device(member) for member in _first_experts(config.workers)]
    placement = first_placement(config, expected, somewhere)
    slots = max((len(s) for b in placement.banks for s in b.physical_to_logical), default=0)
    # the number of threads determines how torch splits sums
    needs_one = config.engine.deterministic == "on" and config.workers.kernels == "torch"
    workers = replace(
        config.workers,
        device=share.device,
        cpus_per_worker=share.cpus or None,
        has_equal_cpus=config.workers.cpus_per_worker is None,
        gpus_per_worker=share.gpus,
        threads_per_worker=1 if needs_one else share.threads,
    )
    engine = config.engine
    if share.device == "cuda":
        engine = engine.on_gpus(_max_attention_ranks(config))
    return StartPlan(
        config=replace(config, workers=workers, engine=engine),
        placement=placement,
        num_slots=slots + config.workers.recovery_slots,
        load=expected,
    )


def _max_attention_ranks(config: ClusterConfig) -> int:
    """Return the number of attention ranks, with autoscaling the largest."""
    if config.autoscale.autoscale == "off":
        return config.workers.num_attention_ranks
    limits = config.autoscale.limits(config.workers.pools)
    return max(pool.max_workers for role, pool in limits.items() if role != "expert")


def _check_labels(config: ClusterConfig, nodes: Sequence[NodeResources]) -> None:
    """Raise ``ConfigError`` for ``follow_nodes`` if a role of workers has no labelled nodes."""
    labelled = {node.labels.role for node in nodes}
    for role in config.workers.pools if config.workers.follow_nodes else ():
        rule = f"needs nodes that are labelled {ROLE}={role}, and there are none"
        check(role in labelled, "follow_nodes", True, rule)


def matches_banks(profile: LoadProfile, banks: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a load profile has exactly these banks with these numbers of experts."""
    wanted = {(b["bank"], b["layer"], b["num_experts"]) for b in banks}
    return {(b.bank, b.layer, len(b.counts)) for b in profile.banks} == wanted


def expected_load(
    config: ClusterConfig, banks: Sequence[Mapping[str, Any]], profile: Mapping[str, Any] | None
) -> LoadProfile:
    """Return ``profile`` with its banks in the model's order, or an even load if it differs.

    A profile differs if its banks or their numbers of experts are not those of ``banks``.
    """
    known = LoadProfile.from_dict(profile) if profile else None
    if known is not None and not matches_banks(known, banks):
        known = None
    loads = []
    for bank in banks:
        kind, layer = str(bank["bank"]), int(bank["layer"])
        counts = known.counts(kind, layer) if known else (1.0,) * int(bank["num_experts"])
        loads.append(BankLoad(bank=kind, layer=layer, counts=counts))
    return LoadProfile(
        model=config.model.served_model_name,
        top_k=max((int(b.get("top_k", 1)) for b in banks), default=1),
        tokens=known.tokens if known else 0,
        banks=tuple(loads),
    )


def first_placement(
    config: ClusterConfig, load: LoadProfile, devices: Sequence[PlannedDevice]
) -> ExpertPlacement:
    """Return the first placement: of the placement file, or planned for the load, or contiguous.

    The placement is planned if a load profile was given, if a load profile exists and rebalancing
    is on, if devices with spare slots are in several failure domains, or if devices differ in
    speed. Local mode has one device. Raises ``ConfigError``.
    """
    workers = config.workers
    shapes = load.bank_shapes
    if workers.mode == "local":
        return contiguous(shapes, 1)
    if workers.placement_file is not None:
        return load_placement(Path(workers.placement_file), shapes, workers.num_expert_workers)
    topology = PlannedTopology(devices=tuple(devices), num_redundant=workers.num_redundant_experts)
    plain = plan_groups(topology, None, lambda _, own, __: _contiguous(shapes, own))
    if plain is None:
        plain = _contiguous(shapes, topology)
    follows_load = config.rebalance.enable_eplb or workers.load_profile is not None
    spreads = topology.num_redundant > 0 and len(set(topology.domains.tolist())) > 1
    speeds_differ = len({d.speed for d in topology.devices}) > 1
    if (follows_load and load.tokens > 0) or spreads or speeds_differ:
        return mesh.plan(load, topology).placement
    return plain


def _contiguous(shapes: Sequence[BankShape], topology: PlannedTopology) -> ExpertPlacement:
    return contiguous(shapes, topology.num_devices, topology.num_redundant)


def _first_experts(workers: WorkersSection) -> list[Member]:
    """Return the expert workers of a start, before their nodes are known."""
    ranks = range(workers.num_expert_workers)
    members = (Member(name="", role="expert", rank=rank, device=rank) for rank in ranks)
    return [workers.with_group(member) for member in members]
