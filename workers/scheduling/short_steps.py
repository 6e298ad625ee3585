"""Steps without the decodes of a tenant, for first tokens of others. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence, Set

from workers.requests.sequence import SequenceState
from workers.scheduling.seat_reserve import SeatReserve


class ShortSteps:
    """Decides which tenants' decodes a step leaves out, so that first tokens of others come soon.

    A tenant with more than its share that has most of the rows is left out of one step: a step
    without its decodes is short, and first tokens of others do not wait for a long one. Never in
    two steps in a row.
    """

    def __init__(self, seats: SeatReserve) -> None:
        self._seats = seats
        self._was_short = False

    def choose(
        self,
        running: Sequence[SequenceState],
        decoding: Sequence[SequenceState],
        others: Sequence[SequenceState],
        num_missing: int,
    ) -> Set[str]:
        """Tenants without decodes in the next step.

        ``others``: sequences that would compute ``num_missing`` rows of prompts beside the decodes.
        """
        if self._was_short or not others:
            return frozenset()
        above = self._seats.above_share(running)
        if not any(s.request.tenant not in above and not s.output for s in others):
            return frozenset()
        num_held = sum(s.request.tenant in above for s in decoding)
        is_shorter = 2 * num_held >= len(decoding) and num_missing <= num_held
        return above if is_shorter else frozenset()

    def note(self, is_short: bool) -> None:
        """A step was planned, with decodes left out or not."""
        self._was_short = is_short
