"""The plans of a rebalancing: what they are made from, and that they are made aside.

The controller's loop must go on while a large model is planned, so that plans are made of values
that nobody changes (``aside``), and are good for nothing once the placement or the generation is
another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from cluster.aside import Aside, Task
from cluster.config import ClusterConfig, RebalanceSection
from cluster.control_frames import ControlFrame
from cluster.devices import CPU_CORE, GPU
from cluster.errors import ConfigError
from cluster.load_profile import LoadProfile
from cluster.load_tracker import LoadTracker, Source
from cluster.migrations import Migrations
from cluster.placement import ExpertPlacement
from cluster.planner.base import PlannedTopology
from cluster.rebalance import (
    LoadNow,
    RebalanceDecision,
    RebalanceSettings,
    decide,
    planned_topology,
    resolved,
)
from cluster.simulate import StepCost
from cluster.topology import Generation
from cluster.worker_table import WorkerTable

logger = logging.getLogger(__name__)

_TOKENS_PER_EXPERT = 4
"""Tokens of a window, for each expert of a bank, below which it says too little."""
_DECODE_ROWS = 16
"""Rows of a decode step, where nobody says otherwise."""


class RebalanceHost(Protocol):
    """What rebalancing needs of the controller."""

    workers: WorkerTable
    placement: ExpertPlacement
    load: LoadTracker
    migrations: Migrations

    @property
    def generation(self) -> Generation:
        """The newest generation."""

    @property
    def runs(self) -> bool:
        """The newest generation runs, and every expert has a copy."""

    def send(self, name: str, frame: ControlFrame) -> None:
        """Send to a worker."""

    def come_into_force(self, placement: ExpertPlacement) -> None:
        """This placement is in force."""

    def reform(self, cause: str, now: float) -> None:
        """Have all members form a new generation."""

    def note(self, cause: str, effect: str, now: float) -> None:
        """Add to the history."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """What a plan was begun from."""

    placement: ExpertPlacement
    """In force then."""
    generation: int
    """The newest then."""


class Plans(Aside):
    """Decisions and shares, computed aside."""

    def __init__(
        self,
        host: RebalanceHost,
        config: ClusterConfig | None,
        *,
        num_slots: int,
        top_k: int,
        executor: Executor | None,
    ) -> None:
        """As for ``Rebalancing``."""
        super().__init__(executor)
        self._host = host
        self._config = config
        self._section = config.rebalance if config is not None else RebalanceSection()
        self._num_slots = num_slots
        self._top_k = max(top_k, 1)

    def decide(
        self, load: LoadNow, then: Callable[[Future[RebalanceDecision], float], None], now: float
    ) -> Task:
        """Whether to change the placement, and to what."""
        section, placement = self._section, self._host.placement
        settings = RebalanceSettings(
            horizon_s=section.horizon_s,
            max_move_fraction=section.max_move_fraction,
            bytes_per_s=section.bytes_per_s,
            step=self._step_cost(),
        )
        work = partial(decide, load, self._topology(placement), placement, settings)
        return self.begin(work, then, now)

    def share(
        self,
        profile: LoadProfile,
        placement: ExpertPlacement,
        then: Callable[[Future[ExpertPlacement], float], None],
        now: float,
    ) -> Task:
        """The best shares and decode homes of a stage, for a load."""
        work = partial(resolved, profile, self._topology(placement), placement)
        return self.begin(work, then, now)

    def load_now(self, has_ended: bool) -> LoadNow | None:
        """See ``load_now``."""
        host = self._host
        model = str(host.workers.model.get("name"))
        return load_now(host.load, host.placement, model, self._top_k, has_ended)

    def basis(self) -> Basis:
        """What a plan is begun from now."""
        return Basis(placement=self._host.placement, generation=self._host.generation.number)

    def has_changed(self, basis: Basis) -> bool:
        """A plan that was begun from this is good for nothing."""
        return not self._host.runs or self.basis() != basis

    def error_of(self, future: Future[Any], basis: Basis) -> str:
        """Why nothing can be done with what was planned; empty where it can."""
        err = future.exception()
        if err is not None and not isinstance(err, ConfigError):
            logger.error("planning failed", exc_info=err)
        if err is not None:
            return str(err) or type(err).__name__
        return "the cluster changed meanwhile" if self.has_changed(basis) else ""

    def _topology(self, placement: ExpertPlacement) -> PlannedTopology:
        """The devices that live; on the way they may hold more than is planned for them."""
        spare = self._config.workers.recovery_slots if self._config is not None else 0
        return planned_topology(self._host.generation.experts, placement, self._num_slots - spare)

    def _step_cost(self) -> StepCost:
        infos = [record.info for record in self._host.workers]
        sizes = [int(info.get("expert_bytes", 0)) for info in infos]
        dtype = next((str(info["dtype"]) for info in infos if "dtype" in info), "float32")
        return step_cost(self._config, max([1, *sizes]), dtype)


def load_now(
    tracker: LoadTracker,
    placement: ExpertPlacement,
    model: str,
    top_k: int,
    has_ended: bool,
) -> LoadNow | None:
    """The newest window where it says enough, else the average; None without load.

    ``has_ended``: it is asked because a window has ended; else all load that was seen does, too.
    """
    newest = tracker.windows[-1] if tracker.windows else None
    experts = max((b.num_experts for b in placement.banks), default=0)
    enough = newest is not None and newest.sums.rows * top_k >= _TOKENS_PER_EXPERT * experts
    source: Source = "window" if enough else "average"
    if not has_ended and newest is None:
        source = "total"
    profile = tracker.profile(source, model, top_k)
    if profile is None or len(profile.banks) != len(placement.banks):
        return None
    sums = tracker.sums(source)
    prefill = sum(float(c.sum()) for c in sums.prefill.values())
    decode = sum(float(c.sum()) for c in sums.decode.values())
    return LoadNow(
        profile=profile,
        prefill_share=prefill / (prefill + decode) if prefill + decode > 0 else 0.0,
    )


def step_cost(config: ClusterConfig | None, expert_bytes: int, dtype: str) -> StepCost:
    """By the roofline of the device (``devices``): a slot's weights are read, each pair is two
    operations a weight. In paced mode it is what experts are told to wait. The policy uses ratios
    only, so that a part of a device counts as a whole one.

    ``expert_bytes``: of the largest expert; ``dtype``: as workers name it.
    """
    workers = config.workers if config is not None else None
    if workers is not None and (workers.paced_slot_us or workers.paced_token_us):
        slot_s, token_s = workers.paced_slot_us / 1e6, workers.paced_token_us / 1e6
    else:
        device = GPU if workers is not None and workers.device == "cuda" else CPU_CORE
        weights = expert_bytes / (4 if dtype == "float32" else 2)
        slot_s = expert_bytes / device.bandwidth_bytes_s
        token_s = 2.0 * weights / device.flops_s
    return StepCost(
        slot_s=slot_s, token_s=token_s, expert_bytes=expert_bytes, decode_tokens=_DECODE_ROWS
    )
