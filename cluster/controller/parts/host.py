"""What the parts of the controller need of the whole.

Each part decides on its own subject. Here it reads the cluster's state, and asks for what
concerns other parts or every worker.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from cluster.controller.parts.epoch_change import ChangeHost
from cluster.controller.parts.generation_round import GenerationRound
from cluster.controller.parts.metrics import ControllerMetrics
from cluster.controller.parts.worker_table import WorkerTable
from cluster.core.placement import ExpertPlacement
from cluster.core.states import ClusterState
from cluster.core.topology import Member
from cluster.load.tracker import LoadTracker
from cluster.planner.stages import Stage
from cluster.policy.failure import FailureDecision


class ControllerHost(ChangeHost, Protocol):
    """The controller, as its parts see it; ``now`` is in monotonic seconds."""

    state: ClusterState
    workers: WorkerTable
    load: LoadTracker
    metrics: ControllerMetrics

    # ---- state ----------------------------------------------------------------------------

    @property
    def round(self) -> GenerationRound:
        """The newest generation and its answers; number 0 before the first."""

    @property
    def is_up(self) -> bool:
        """Nothing has ended the cluster yet."""

    @property
    def takes_orders(self) -> bool:
        """The cluster is neither starting nor ending."""

    @property
    def runs(self) -> bool:
        """The newest generation runs, and every expert has a copy."""

    @property
    def is_forming(self) -> bool:
        """A generation is announced but does not run yet."""

    @property
    def awaits_experts(self) -> bool:
        """Workers still load experts that the newest generation needs."""

    def expert_load(self) -> Mapping[tuple[str, int], Sequence[float]]:
        """(bank, layer) -> tokens by logical expert so far."""

    def above(self, placement: ExpertPlacement) -> ExpertPlacement:
        """The placement with an epoch above every epoch that workers may know."""

    def stage_without(self, devices: Collection[int]) -> Stage:
        """A placement without these devices, and what the others must load for it.

        Raises ``ConflictError`` if the others have no room.
        """

    # ---- what the snapshot shows ----------------------------------------------------------

    def touch(self) -> None:
        """Mark the snapshot as changed."""

    def note(self, cause: str, effect: str, now: float) -> None:
        """Add to the history."""

    def remember(self) -> None:
        """Make the workers keep the state that a restarted controller needs."""

    # ---- generations ----------------------------------------------------------------------

    def form(self, decision: FailureDecision, now: float) -> None:
        """Announce the next generation and record the cause."""

    def reform(self, cause: str, now: float) -> None:
        """Have all members form a generation with the placement in force."""

    def run_if_ready(self, now: float) -> None:
        """Run the generation that is being formed if it is complete."""

    def ran(self, first_step: int, now: float) -> None:
        """The newest generation runs from this step on."""

    def stall(self, decision: FailureDecision, now: float) -> None:
        """Keep the members for a later generation: none can run now."""

    def settle(self) -> None:
        """Enter the state of a stalled cluster: RECOVERING while workers are coming."""

    # ---- workers --------------------------------------------------------------------------

    def lost(self, reasons: Mapping[str, str], now: float) -> None:
        """Declare workers lost (name -> reason)."""

    def start_worker(self, member: Member, placement: ExpertPlacement) -> None:
        """Start a worker for an empty place, with its part of a placement."""

    def hold_back(self, names: Sequence[str], drains: bool) -> None:
        """Tell the gateways whether these workers take requests."""

    def leave(self, names: Sequence[str], why: str, now: float) -> None:
        """Form a generation without these workers, which leave the cluster."""

    def end(self, names: Sequence[str]) -> None:
        """End the processes of workers that have left; calls ``Draining.ended`` afterwards."""

    def refill(self, names: Sequence[str]) -> None:
        """Start new workers in the places of these."""
