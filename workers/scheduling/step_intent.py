"""What the next step of a worker is meant to run, before it is granted rows. Pure.

intent = scheduler.intent(restriction)     the rows of ``intent.wanted`` go to the leader
plan = scheduler.plan(intent, grant)       once the step header has granted some of them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import chain

from workers.requests.sequence import SequenceState
from workers.scheduling.step_plan import RowsWanted


@dataclass(frozen=True, slots=True)
class Restriction:
    """Which requests may have rows in a step."""

    held: Set[str] = frozenset()
    """Ids of those that may not."""
    alone: str | None = None
    """The only one that may, ``held`` or not; None: there is none."""

    @property
    def is_open(self) -> bool:
        """All requests may have rows."""
        return not self.held and self.alone is None

    def allows(self, sequence: SequenceState) -> bool:
        """Whether a sequence that is not idle may have rows."""
        request_id = sequence.request.request_id
        return request_id not in self.held if self.alone is None else request_id == self.alone


@dataclass(frozen=True, slots=True)
class StepIntent:
    """The rows that the next step would run if all were granted."""

    restriction: Restriction = field(default_factory=Restriction)
    wanted: RowsWanted = field(default_factory=RowsWanted)
    """For the proposal to the leader."""
    without_decodes: Set[str] = frozenset()
    """Tenants whose decodes are left out of the step: see ``ShortSteps``."""
    groups: tuple[Sequence[SequenceState], ...] = ()
    """The sequences that the rows are of: those that decode, and others."""

    @property
    def sequences(self) -> Iterator[SequenceState]:
        """All of ``groups``."""
        return chain(*self.groups)

    def leaves_out(self, sequence: SequenceState) -> bool:
        """Whether the step runs no decode of a sequence."""
        return sequence.request.tenant in self.without_decodes

    def under(self, restriction: Restriction) -> StepIntent:
        """The same for what the restriction is when the rows are granted."""
        return replace(self, restriction=restriction)
