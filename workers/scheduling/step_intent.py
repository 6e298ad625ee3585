"""The rows that a worker wants to run in the next step, before the leader grants them. Pure.

intent = scheduler.intent(restriction)     the worker sends ``intent.wanted`` to the leader
plan = scheduler.plan(intent, grant)       after the step header has granted some of the rows
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

    held_requests: Set[str] = frozenset()
    """Ids of requests that must not have rows in the step."""
    solo_request: str | None = None
    """Id of the only request that may have rows, even if it is in ``held_requests``; None if all
    requests outside ``held_requests`` may."""

    @property
    def is_open(self) -> bool:
        """Whether all requests may have rows."""
        return not self.held_requests and self.solo_request is None

    def allows(self, sequence: SequenceState) -> bool:
        """Whether the restriction allows rows of a sequence's request in the step."""
        request_id = sequence.request.request_id
        return (
            request_id not in self.held_requests
            if self.solo_request is None
            else request_id == self.solo_request
        )


@dataclass(frozen=True, slots=True)
class StepIntent:
    """Rows that a worker would run in the next step if the leader granted all of them."""

    restriction: Restriction = field(default_factory=Restriction)
    wanted: RowsWanted = field(default_factory=RowsWanted)
    """Numbers of rows for the proposal to the leader."""
    left_out_tenants: Set[str] = frozenset()
    """Tenants whose decodes the step leaves out, so that other tenants get first tokens earlier;
    see ``ShortSteps``."""
    groups: tuple[Sequence[SequenceState], ...] = ()
    """Sequences that would have rows: running ones that decode, running ones with prompt rows,
    waiting ones that would decode, waiting ones with prompt rows."""
    num_changes: int | None = None
    """``SequenceQueues.num_changes`` at the choice of ``groups``; None if the restriction was
    changed since."""

    @property
    def sequences(self) -> Iterator[SequenceState]:
        """All sequences that would have rows, in the order of ``groups``."""
        return chain(*self.groups)

    def leaves_out(self, sequence: SequenceState) -> bool:
        """Whether the step leaves out the decode rows of a sequence, because of its tenant."""
        return sequence.request.tenant in self.left_out_tenants

    def with_restriction(self, restriction: Restriction) -> StepIntent:
        """Return this intent with a restriction, as a copy if the restriction is another.

        Requests may have been paused between the proposal and the grant.
        """
        if restriction == self.restriction:
            return self
        return replace(self, restriction=restriction, num_changes=None)
