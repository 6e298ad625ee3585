"""The roles of one worker: attention, experts, or both."""

from __future__ import annotations

from cluster.core.frames import KeepAdapters, SlotContents
from cluster.core.load_report import LoadReport
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.process.roles.attention import AttentionRole
from workers.process.roles.experts import ExpertRole


class Roles:
    """Passes each event of a worker to the roles that are loaded.

    If a worker has both roles, the attention role runs the steps, and its dispatcher computes
    the rows of other workers in them.
    """

    def __init__(self) -> None:
        self.attention: AttentionRole | None = None
        self.experts: ExpertRole | None = None

    # Data thread

    def enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        """Apply the placement of a new generation with open connections, or of a new epoch."""
        if (leading := self.attention or self.experts) is not None:
            leading.enter(generation, placement)

    def begin_steps(self, generation: int) -> None:
        """Accept the streams of gateways: the steps of this generation start."""
        if self.attention is not None:
            self.attention.begin_steps(generation)

    def lose_members(self) -> None:
        """Handle the death of members of the last generation; the last step was abandoned."""
        if self.attention is not None:
            self.attention.lose_members()

    def keep_adapters(self, command: KeepAdapters) -> None:
        """Load missing adapters of the command and free all others, if attention runs here."""
        if self.attention is not None:
            self.attention.adapters.handle_command(command)

    def between_steps(self) -> None:
        """Do the work that needs no step. Called in every iteration, also outside a generation."""
        if self.attention is not None:
            self.attention.between_steps()

    def run_step(self) -> None:
        """Wait for a step and run it; return without one if the thread is woken."""
        if (leading := self.attention or self.experts) is not None:
            leading.run_step()

    # Control thread

    def slots(self) -> SlotContents:
        """Contents of the expert slots; empty without slots and while weights are loaded."""
        return () if self.experts is None else self.experts.slots.rows()

    def stats(self) -> dict[str, float]:
        """Gauges and counters for heartbeats."""
        stats = {} if self.experts is None else self.experts.stats()
        if self.attention is not None:
            return stats | self.attention.stats()
        return stats if self.experts is None else stats | self.experts.step_stats()

    def load_report(self) -> LoadReport | None:
        """Expert load; None on a worker without attention, which does not count it."""
        return None if self.attention is None else self.attention.engine.load.report()

    def adapters_in_use(self) -> tuple[str, ...]:
        """Keys of the adapters that requests use."""
        return () if self.attention is None else self.attention.adapters_in_use()

    def problems(self, worker: str) -> tuple[str, ...]:
        """Texts about failed components of this worker, for status output."""
        tiers = None if self.attention is None else self.attention.tiers
        return () if tiers is None else tiers.problems(worker)
