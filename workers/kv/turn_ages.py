"""Ages of turns, and observations of their reuse. Pure.

The age of a turn is the number of blocks that were freed since it ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from workers.kv.reuse_rates import NUM_BINS, ReuseRates, bin_end, bin_of
from workers.kv.turns import NO_HINTS, KeepHints, Turn

MAX_TURNS = 16_384
"""Limit of turns that are remembered after their eviction, to observe when they are reused."""


class TurnAges:
    """Assigns turns to bins by age and finds the earlier turn that a new one continues."""

    def __init__(self, rates: ReuseRates) -> None:
        self._rates = rates
        self._clock = 0
        self._tails: OrderedDict[bytes, Turn] = OrderedDict()  # observed turns by last prompt block
        self._ageing: list[tuple[int, int, Turn]] = []  # end of the bin, number, turn
        self._num_pushed = 0

    def note_freed(self) -> None:
        """Count a freed block, which increases the age of all ended turns by one."""
        self._clock += 1

    def value(self, turn: Turn) -> float:
        """Return the value of keeping the blocks of an ended turn."""
        return self._rates.value(turn.kind, turn.age_bin, self._clock - turn.freed)

    def predecessor(self, names: Sequence[bytes]) -> Turn | None:
        """Return the turn that a prompt with these blocks continues.

        None without such a turn, or if another turn already continues it.
        """
        found = next((self._tails[name] for name in reversed(names) if name in self._tails), None)
        return None if found is None or found.is_over else found

    def begin(self, names: Sequence[bytes], hints: KeepHints, before: Turn | None) -> Turn:
        """Create a turn; count ``before``, which it continues (``predecessor``), as reused."""
        num_before = 0
        if before is not None:
            num_before = before.num_before + 1
            self._rates.note_reused(before.kind, before.age_bin)
            before.is_over = True
        kind = ReuseRates.kind(num_before, has_session=bool(hints.session))
        return Turn(hints, kind, num_before, names[-1] if names else None)

    def unobserved_turn(self, *, was_found: bool) -> Turn:
        """Create a turn, whose reuse is not measured, for a block that no request left."""
        kind = ReuseRates.kind(int(was_found), has_session=False)
        turn = Turn(NO_HINTS, kind, int(was_found), is_over=True)
        turn.freed = self._clock
        return turn

    def end(self, turn: Turn) -> None:
        """End a turn: its age counts from now, and a later turn may continue it."""
        turn.freed = self._clock
        self.start(turn)
        if turn.tail is None:
            return
        if (before := self._tails.pop(turn.tail, None)) is not None:
            before.is_over = True
        self._tails[turn.tail] = turn
        if len(self._tails) > MAX_TURNS:
            self._tails.popitem(last=False)[1].is_over = True

    def start(self, turn: Turn) -> None:
        """Put an ended turn into the bin of its age and schedule its moves to later bins."""
        turn.age_bin = bin_of(self._clock - turn.freed)
        self._note_bin(turn)

    def advance_bin(self, turn: Turn) -> None:
        """Move a due turn to the next bin."""
        turn.age_bin += 1
        self._note_bin(turn)

    def due(self) -> Iterator[Turn]:
        """Yield turns too old for their bin; call ``advance_bin`` for each before the next one."""
        while self._ageing and self._ageing[0][0] <= self._clock:
            turn = heappop(self._ageing)[2]
            if turn.is_over and turn.queue is None:
                turn.age_bin = -1
            else:
                yield turn

    def _note_bin(self, turn: Turn) -> None:
        if not turn.is_over:
            self._rates.note_reached(turn.kind, turn.age_bin)
        if turn.age_bin < NUM_BINS - 1:
            self._num_pushed += 1
            heappush(self._ageing, (turn.freed + bin_end(turn.age_bin), self._num_pushed, turn))
