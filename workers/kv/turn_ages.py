"""How turns age, and what their next use teaches. Pure.

The age of a turn is the number of blocks that were freed since it ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from workers.kv.reuse_rates import NUM_BINS, ReuseRates, bin_end, bin_of
from workers.kv.turns import NO_HINTS, KeepHints, Turn

MAX_TURNS = 16_384
"""Turns that are remembered after their blocks are gone, to learn when they are used again."""


class TurnAges:
    """Decides in which bin of ages a turn is, and which earlier turn a new one continues."""

    def __init__(self, rates: ReuseRates) -> None:
        self._rates = rates
        self._clock = 0
        self._tails: OrderedDict[bytes, Turn] = OrderedDict()  # turns to learn from
        self._ageing: list[tuple[int, int, Turn]] = []  # end of the bin, number, turn
        self._num_pushed = 0

    def note_freed(self) -> None:
        """A block was freed: all turns that have ended are older by one."""
        self._clock += 1

    def value(self, turn: Turn) -> float:
        """Value of keeping the blocks of a turn that has ended."""
        return self._rates.value(turn.kind, turn.age_bin, self._clock - turn.freed)

    def predecessor(self, names: Sequence[bytes]) -> Turn | None:
        """The turn that a prompt with these blocks continues; None if it was used again already."""
        found = next((self._tails[name] for name in reversed(names) if name in self._tails), None)
        return None if found is None or found.is_over else found

    def begin(self, names: Sequence[bytes], hints: KeepHints, before: Turn | None) -> Turn:
        """A turn that continues its ``predecessor``, which is over now."""
        num_before = 0
        if before is not None:
            num_before = before.num_before + 1
            self._rates.note_reused(before.kind, before.age_bin)
            before.is_over = True
        kind = ReuseRates.kind(num_before, has_session=bool(hints.session))
        return Turn(hints, kind, num_before, names[-1] if names else None)

    def lone_turn(self, *, was_found: bool) -> Turn:
        """The turn of a block that no request left: nothing is learned from it."""
        kind = ReuseRates.kind(int(was_found), has_session=False)
        turn = Turn(NO_HINTS, kind, int(was_found), is_over=True)
        turn.freed = self._clock
        return turn

    def end(self, turn: Turn) -> None:
        """The age of a turn counts from now on, and it may have a successor."""
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
        """Put an ended turn into the bin of its age, which then follows the age."""
        turn.age_bin = bin_of(self._clock - turn.freed)
        self._note_bin(turn)

    def move_on(self, turn: Turn) -> None:
        """A turn that is due is in the next bin."""
        turn.age_bin += 1
        self._note_bin(turn)

    def due(self) -> Iterator[Turn]:
        """Turns that have left the bin of their age; ``move_on`` each before the next."""
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
