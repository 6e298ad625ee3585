"""Short steps, without the decodes of some tenants, so that other tenants get first tokens earlier.

Pure: no clock or socket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

from workers.requests.sequence import SequenceState
from workers.scheduling.seat_reserve import SeatReserve


class ShortSteps:
    """Decides which tenants' decodes a step leaves out, so that others get first tokens earlier.

    A short step leaves out the decodes of tenants that are above their share and have at least half
    of the decodes. It computes the prompts of other tenants without waiting for these decodes. Two
    steps in a row are never short.
    """

    def __init__(self, seats: SeatReserve) -> None:
        self._seats = seats
        self._was_short = False

    def choose(
        self,
        running: Counter[str],
        decoding: Sequence[SequenceState],
        others: Sequence[SequenceState],
        num_missing: int,
    ) -> Set[str]:
        """Return the tenants whose decodes the next step leaves out; empty for a normal step.

        ``running``: number of running sequences by tenant. ``others``: sequences that would
        compute ``num_missing`` prompt rows in this step.
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
        """Record whether the step that was planned last is short (leaves out decodes)."""
        self._was_short = is_short
