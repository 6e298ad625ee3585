"""Options of the worker pools: their sizes, and the resources of each worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from cluster.config.option_metadata import INTERNAL
from cluster.core.checks import (
    check,
    check_choice,
    check_each,
    is_at_least_1,
    is_not_negative,
    is_positive,
)
from cluster.core.topology import Member, Role

Mode = Literal["disaggregated", "colocated", "local", "auto"]
Device = Literal["auto", "cpu", "cuda"]
DeviceSpeed = Literal["given", "measured"]
ShareExperts = Literal["yes", "no", "auto"]
Kernels = Literal["auto", "torch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersSection:
    """Number of workers, and the resources of each."""

    mode: Mode = "disaggregated"
    """``disaggregated``: attention workers and expert workers; ``colocated``: every worker does
    both; ``local``: one worker does both; ``auto``: the faster of the first two, chosen at
    start."""
    mode_reason: str = field(default="", metadata=INTERNAL)
    """Reason why ``auto`` chose this mode, or this value of ``share_experts``; empty if both were
    given."""
    num_attention_workers: int | None = None
    """Number of attention workers; by default 1, in colocated mode ``num_expert_workers``."""
    num_prefill_workers: int | None = None
    """Number of attention workers that compute prompts, in a step group of their own; given
    together with ``num_decode_workers``. By default all attention workers are one group."""
    num_decode_workers: int | None = None
    """Number of attention workers that decode; see ``num_prefill_workers``."""
    share_experts: ShareExperts = "yes"
    """Whether the step groups share all expert workers: ``no`` divides these in proportion to the
    attention workers, so that each group has all experts once; ``auto`` chooses at start."""
    num_expert_workers: int = 2
    """Number of expert workers; in colocated mode of all workers, in local mode without effect."""
    num_redundant_experts: int = 0
    """Number of spare expert slots on each expert worker and layer, for redundant copies."""
    recovery_slots: int = 0
    """Number of expert slots on each expert worker and layer that stay free for recovery."""
    device: Device = "auto"
    """Device of the workers; ``auto`` takes ``cuda`` if every worker can get a share of a GPU."""
    kernels: Kernels = "auto"
    """Kernels on CPUs: ``auto`` takes the compiled kernels if they can be built, otherwise torch;
    ``torch`` always takes torch."""
    cpus_per_worker: float | None = None
    """CPUs that Ray reserves for each worker, also a fraction; by default an equal share. A worker
    computes with one thread for each whole CPU, at least one."""
    has_equal_cpus: bool = field(default=False, metadata=INTERNAL)
    """Whether ``cpus_per_worker`` was not given, and is an equal share of all CPUs."""
    reserves_cpus: bool = field(default=True, metadata=INTERNAL)
    """Whether Ray reserves the equal share of CPUs; False for a fleet that is loaded beside others,
    which have reserved all."""
    other_pools: tuple[tuple[Role, int], ...] = field(default=(), metadata=INTERNAL)
    """Number of workers of the other served models by role, which share the nodes equally."""
    threads_per_worker: int = field(default=1, metadata=INTERNAL)
    """Number of compute threads of a worker, set by ``cluster.sizing.start_plan.plan_start``."""
    gpus_per_worker: float | None = None
    """GPUs that Ray reserves for each worker, at most 1, also a fraction; by default 1 on CUDA, 0
    on CPUs."""
    placement_file: str | None = None
    """File of the placement to start with; by default expert ids are assigned in order."""
    load_profile: str | None = None
    """File of the expert load for which the first placement is planned; with ``enable_eplb`` the
    default is the checkpoint's profile."""
    follow_nodes: bool = False
    """Let pool sizes follow the nodes labelled for a role: a new node gets as many workers as fit;
    the workers of a node that leaves are drained and not replaced."""
    device_speed: DeviceSpeed = "given"
    """Source of the worker speeds, to which expert load is proportional: ``given`` by node labels,
    or ``measured`` by each worker after loading."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, Mode)
        check_choice("device", self.device, Device)
        check_choice("kernels", self.kernels, Kernels)
        check_choice("device_speed", self.device_speed, DeviceSpeed)
        check_choice("share_experts", self.share_experts, ShareExperts)
        self._check_groups()
        at_least_one = (
            ("num_attention_workers", self.num_attention_ranks),
            ("num_expert_workers", 1 if self.mode == "local" else self.num_expert_workers),
        )
        for name, value in at_least_one:
            check(value >= 1, name, value, "must be at least 1")
        is_one = self.mode == "local" and self.follow_nodes
        check(
            not is_one, "follow_nodes", True, "must not be given in local mode: one worker is all"
        )
        counts = "num_redundant_experts recovery_slots"
        check_each(self, counts, is_not_negative, "must not be negative")
        only = "must not be given together with placement_file, which is a placement"
        both = self.placement_file is not None and self.load_profile is not None
        check(not both, "load_profile", self.load_profile, only)
        attention, experts = self.num_attention_ranks, self.num_expert_workers
        if self.mode == "local":
            check(attention == 1, "num_attention_workers", attention, "must be 1 in local mode")
        elif self.mode == "colocated":
            rule = f"must be left out or equal num_expert_workers ({experts}) in colocated mode"
            check(attention == experts, "num_attention_workers", attention, rule)
        check_each(self, "cpus_per_worker", is_positive, "must be > 0")
        check_each(self, "threads_per_worker", is_at_least_1, "must be at least 1")
        check_each(self, "gpus_per_worker", is_not_negative, "must be >= 0")
        rule = "must not exceed 1: a worker computes on one GPU, without tensor parallelism"
        check_each(self, "gpus_per_worker", lambda gpus: gpus <= 1, rule)

    def _check_groups(self) -> None:
        prefill, decode = self.num_prefill_workers, self.num_decode_workers
        shared, is_shared = self.share_experts, self.share_experts == "yes"
        if prefill is None and decode is None:
            rule = "must be yes without num_prefill_workers and num_decode_workers"
            check(is_shared, "share_experts", shared, rule)
            return
        for name, value in (("num_prefill_workers", prefill), ("num_decode_workers", decode)):
            check(value is not None, name, value, "must be given, as the other step group is")
        check_each(self, "num_prefill_workers num_decode_workers", is_at_least_1, "must be >= 1")
        rule = "must be disaggregated with num_prefill_workers"
        check(self.mode == "disaggregated", "mode", self.mode, rule)
        rule = "must not be no with one expert worker: each step group needs one"
        check(shared != "no" or self.num_expert_workers > 1, "share_experts", shared, rule)
        rule = "must be yes with placement_file, which assigns the experts"
        check(is_shared or self.placement_file is None, "share_experts", shared, rule)
        rule = "must be left out with num_prefill_workers and num_decode_workers"
        value = self.num_attention_workers
        check(value is None, "num_attention_workers", value, rule)

    @property
    def num_step_groups(self) -> int:
        """Number of groups of attention workers that run steps together."""
        return 1 if self.num_prefill_workers is None else 2

    def with_group(self, member: Member) -> Member:
        """Return a worker with its step group at the start: the first ranks compute prompts, also
        of expert workers that a group has for itself. A worker that has a group keeps it."""
        number = self.num_prefill_workers if member.runs_attention else self.num_prefill_experts
        if not number or member.group:
            return member
        return replace(member, group="prefill" if member.rank < number else "decode")

    @property
    def num_prefill_experts(self) -> int:
        """Number of expert workers of the prefill group alone; 0 if the groups share them."""
        if self.share_experts != "no" or self.num_prefill_workers is None:
            return 0
        share = self.num_expert_workers * self.num_prefill_workers / self.num_attention_ranks
        return min(max(int(share + 0.5), 1), self.num_expert_workers - 1)

    @property
    def num_attention_ranks(self) -> int:
        """Number of workers that run attention."""
        if self.num_prefill_workers is not None and self.num_decode_workers is not None:
            return self.num_prefill_workers + self.num_decode_workers
        if self.num_attention_workers is not None:
            return self.num_attention_workers
        return self.num_expert_workers if self.mode == "colocated" else 1

    @property
    def pools(self) -> dict[Role, int]:
        """Number of workers to start, by role."""
        match self.mode:
            case "colocated":
                return {"colocated": self.num_expert_workers}
            case "local":
                return {"attention": 1}
            case _:
                return {"attention": self.num_attention_ranks, "expert": self.num_expert_workers}

    @property
    def num_workers(self) -> int:
        return sum(self.pools.values())
