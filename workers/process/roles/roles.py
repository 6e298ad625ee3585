"""The roles of one worker: attention, experts, or both."""

from __future__ import annotations

from cluster.core.frames import KeepAdapters, SlotContents
from cluster.core.load_report import LoadReport
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.process.roles.attention import AttentionRole
from workers.process.roles.experts import ExpertRole


class Roles:
    """Passes each event of a worker to the role that it concerns, once its weights are loaded.

    If a worker has both roles, attention runs the steps, and its dispatcher serves the rows of
    others in them.
    """

    def __init__(self) -> None:
        self.attention: AttentionRole | None = None
        self.experts: ExpertRole | None = None

    # Data thread

    def enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        """Apply the maps of a generation with open edges."""
        if (leading := self.attention or self.experts) is not None:
            leading.enter(generation, placement)

    def begin_steps(self, generation: int) -> None:
        """Accept clients, as this generation runs."""
        if self.attention is not None:
            self.attention.begin_steps(generation)

    def lose_members(self) -> None:
        """Handle the death of members of the last generation; the last step was abandoned."""
        if self.attention is not None:
            self.attention.engine.requests.record_worker_death()

    def keep_adapters(self, command: KeepAdapters) -> None:
        """Load these adapters; only workers that run attention get this command."""
        if self.attention is not None:
            self.attention.adapters.handle_command(command)

    def between_steps(self) -> None:
        """Work at the start of every iteration, in a generation or not."""
        if self.attention is not None:
            self.attention.between_steps()

    def run_step(self) -> None:
        """Wait for a step and run it, or return after a wake-up."""
        if (leading := self.attention or self.experts) is not None:
            leading.run_step()

    # Control thread

    def slots(self) -> SlotContents:
        """Contents of the expert slots; empty without slots, or while they are filled."""
        return () if self.experts is None else self.experts.slots.rows()

    def stats(self) -> dict[str, float]:
        """Gauges and counters for heartbeats."""
        stats = {} if self.experts is None else self.experts.stats()
        if self.attention is not None:
            return stats | self.attention.stats()
        return stats if self.experts is None else stats | self.experts.step_stats()

    def load_report(self) -> LoadReport | None:
        """Expert load; None if this worker does not count it."""
        return None if self.attention is None else self.attention.engine.load.report()

    def adapters_in_use(self) -> tuple[str, ...]:
        """Keys of the adapters that requests use."""
        return () if self.attention is None else self.attention.adapters_in_use()

    def problems(self, worker: str) -> tuple[str, ...]:
        """Readable problems of parts of this worker."""
        tiers = None if self.attention is None else self.attention.tiers
        return () if tiers is None else tiers.problems(worker)
