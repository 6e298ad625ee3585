"""The order in which cached KV blocks are evicted. Pure; for worker pools and for the simulation.

What is evicted first:

1. Blocks that were lent to another worker: the borrower has a copy, and the chat continues there.
   This does not hold where other prefixes build on the block, or once it is found again. The
   borrower's copy counts as an original, so the last copy is never evicted as a duplicate.
2. Blocks whose request said that nobody will use them again (``keep_s`` 0).
3. All others, those first whose next use is worth least (``workers.kv.reuse_rates``): at first the
   least recently used, where the age of a turn that continued another one counts half.
4. Blocks that a request asked to keep, as long as it asked for: those of the tenant with the most
   of them, of the lowest priority, the least recently used.

Blocks belong to the turn that used them last, and its end is evicted first. Blocks build on each
other, and the end of a prefix is useless without its beginning: where a block behind it belongs to
another turn, the beginning shares that turn's fate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush

from workers.kv.reuse_rates import NUM_BINS, USED_RATE, ReuseRates, bin_end, bin_of
from workers.kv.turns import NO_HINTS, KeepHints, Turn, TurnQueue

MAX_TURNS = 16_384
"""Turns that are remembered after their blocks are gone, to learn when they are used again."""


class EvictionOrder:
    """Blocks by name, and those of them that may be evicted. Age is counted in blocks freed.

    Example: a, b, c are freed in this order, a was found before, and c is lent: c goes first, then
    b (age 1), since the age of a counts half (2 * 0.5 = 1, and the newer kind goes first).
    """

    def __init__(self, used_rate: float = USED_RATE, max_kept: int = 0) -> None:
        """``used_rate``: see ``ReuseRates``. ``max_kept``: blocks that requests may have kept
        before others (``KeepHints.keep_s``), in equal parts by tenant.
        """
        self.rates = ReuseRates(used_rate)
        """What is learned."""
        self.num_kept = 0
        """Free blocks that are kept before others."""
        self._max_kept = max_kept
        self._clock = 0
        self._now_s = 0.0
        self._parents: dict[bytes, bytes | None] = {}
        self._children: dict[bytes, set[bytes]] = {}
        self._was_found: set[bytes] = set()
        self._is_lent: set[bytes] = set()
        self._lent: OrderedDict[bytes, None] = OrderedDict()
        self._turns: dict[bytes, Turn] = {}  # of blocks that were not found since they were freed
        self._unwanted: TurnQueue = OrderedDict()
        self._cells: dict[tuple[int, int], TurnQueue] = {}  # by kind and bin of the age
        self._kept: dict[str, TurnQueue] = {}  # by tenant
        self._victim: Turn | None = None
        self._tails: OrderedDict[bytes, Turn] = OrderedDict()  # turns to learn from
        self._ageing: list[tuple[int, int, Turn]] = []  # end of the bin, number, turn
        self._expiring: list[tuple[float, int, Turn]] = []  # time, number, turn
        self._num_pushed = 0

    @property
    def free(self) -> list[bytes]:
        """Blocks that may be evicted."""
        return [*self._lent, *(name for turn in self._all_turns() for name in turn.blocks)]

    def advance(self, now_s: float) -> None:
        """The time, for blocks that are kept for a while; it never goes back."""
        self._now_s = now_s
        while self._expiring and self._expiring[0][0] <= now_s:
            self._keep_no_longer(heappop(self._expiring)[2])

    # Blocks

    def learn(self, name: bytes, parent: bytes | None) -> None:
        """A block has contents now, which build on ``parent``."""
        self._parents[name] = parent
        if parent is not None:
            self._children.setdefault(parent, set()).add(name)

    def forget(self, name: bytes) -> None:
        """A block's contents are gone, or must not be found."""
        self.hold(name)
        parent = self._parents.pop(name)
        if parent is not None:
            self._children[parent].discard(name)
            if not self._children[parent]:
                del self._children[parent]
        self._turns.pop(name, None)
        self._was_found.discard(name)
        self._is_lent.discard(name)

    def find(self, name: bytes) -> None:
        """A block was found: it serves one more request."""
        self._was_found.add(name)
        self._is_lent.discard(name)
        turn = self._turns.get(name)
        if turn is not None and name not in turn.blocks:  # it is held
            del self._turns[name]

    def was_found(self, name: bytes) -> bool:
        """Whether a block was found since it has these contents."""
        return name in self._was_found

    def hold(self, name: bytes) -> None:
        """A block has a holder now: it cannot be evicted."""
        if name in self._lent:
            del self._lent[name]
        elif (turn := self._turns.get(name)) is not None and name in turn.blocks:
            self._take_out(turn, name)

    def release(self, name: bytes, turn: Turn | None = None) -> None:
        """A block has no holder any more. Release the end of a prefix first.

        ``turn`` is that of its last holder, if this was a request; call ``end`` once all its blocks
        are released. Otherwise a block that was not found meanwhile returns to its turn.
        """
        self._clock += 1
        if turn is None or (turn.hints.keep_s == 0 and name in self._was_found):
            turn = self._turns.get(name) or self._lone_turn(name)
        self._turns[name] = turn
        if name in self._is_lent:
            self._lent[name] = None
            return
        self._put_in(turn, name)

    def leave(self, name: bytes, turn: Turn) -> None:
        """A request has ended, and others still hold a block that it had: unless one of them is a
        request, or it is found meanwhile, the block goes to this turn when it is free."""
        if turn.hints.keep_s != 0 or name not in self._was_found:
            self._turns[name] = turn

    def lend(self, names: Sequence[bytes]) -> None:
        """Another worker has a copy of this prefix, whose blocks are named in order."""
        num_lent_children = 0
        for name in reversed(names):
            if name not in self._parents:
                continue
            if len(self._children.get(name, ())) > num_lent_children:
                return  # other prefixes build on it
            self._is_lent.add(name)
            if (turn := self._turns.get(name)) is not None and name in turn.blocks:
                self._take_out(turn, name)
                self._lent[name] = None
            num_lent_children = 1

    def pop(self) -> bytes:
        """The block to evict, which is held from now on. There must be a free one."""
        if self._lent:
            return self._lent.popitem(last=False)[0]
        while True:
            if self._victim is None:
                self._victim = self._least()
            turn = self._victim
            name = next(iter(turn.blocks))
            heir = self._heir(name)
            self._take_out(turn, name)
            if heir is None:
                return name
            self._turns[name] = heir
            self._put_in(heir, name)

    # Turns

    def begin(self, names: Sequence[bytes], hints: KeepHints = NO_HINTS) -> Turn:
        """A request begins whose prompt has these blocks, known ones and others, in order."""
        before = next((self._tails[name] for name in reversed(names) if name in self._tails), None)
        num_before = 0
        if before is not None and not before.is_over:
            num_before = before.num_before + 1
            self._catch_up()
            self.rates.note_reused(before.kind, before.age_bin)
            before.is_over = True
        kind = ReuseRates.kind(num_before, has_session=bool(hints.session))
        return Turn(hints, kind, num_before, names[-1] if names else None)

    def end(self, turn: Turn) -> None:
        """A request has ended, and its blocks are released."""
        keep_s = turn.hints.keep_s
        turn.freed = self._clock
        turn.is_kept = bool(keep_s)
        self._victim = None
        self._age(turn)
        if turn.tail is not None:
            self._remember(turn.tail, turn)
        if turn.blocks:
            self._file(turn)
        if keep_s:
            self._num_pushed += 1
            heappush(self._expiring, (self._now_s + keep_s, self._num_pushed, turn))
            self._limit_kept()

    def check_integrity(self, held: Iterable[bytes]) -> None:
        """Assert that the known blocks are those held and those free, each once."""
        free = self.free
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free).isdisjoint(held), "a held block may be given up"
        assert {*free, *held} == self._parents.keys(), "free and held are not all blocks"
        children: dict[bytes, set[bytes]] = {}
        for name, parent in self._parents.items():
            if parent is not None:
                children.setdefault(parent, set()).add(name)
        assert children == self._children, "blocks that build on others are miscounted"
        for turn in self._all_turns():
            assert turn.blocks, "a turn without blocks waits for its eviction"
            assert all(self._turns[name] is turn for name in turn.blocks), "turns are mixed up"
        assert self._turns.keys() <= self._parents.keys(), "an unknown block has a turn"
        num_kept = sum(_num_blocks(queue) for queue in self._kept.values())
        assert num_kept == self.num_kept, "kept blocks are miscounted"
        assert num_kept <= self._max_kept, "too many blocks are kept"

    def _all_turns(self) -> Iterator[Turn]:
        for queue in (self._unwanted, *self._cells.values(), *self._kept.values()):
            yield from queue

    def _lone_turn(self, name: bytes) -> Turn:
        """The turn of a block that no request left: nothing is learned from it."""
        num_before = int(name in self._was_found)
        kind = ReuseRates.kind(num_before, has_session=False)
        turn = Turn(NO_HINTS, kind, num_before, is_over=True)
        turn.freed = self._clock
        self._victim = None
        return turn

    def _remember(self, tail: bytes, turn: Turn) -> None:
        if (before := self._tails.pop(tail, None)) is not None:
            before.is_over = True
        self._tails[tail] = turn
        if len(self._tails) > MAX_TURNS:
            self._tails.popitem(last=False)[1].is_over = True

    # Queues

    def _file(self, turn: Turn) -> None:
        """Put a turn with blocks into its queue."""
        if turn.age_bin < 0:
            self._age(turn)
        if turn.is_kept:
            queue = self._kept.setdefault(turn.hints.tenant, OrderedDict())
        elif turn.hints.keep_s == 0:
            queue = self._unwanted
        else:
            queue = self._cell_of(turn)
        is_oldest = bool(queue) and turn.freed < next(iter(queue)).freed
        queue[turn] = None
        turn.queue = queue
        self.num_kept += len(turn.blocks) * turn.is_kept
        if is_oldest:
            queue.move_to_end(turn, last=False)

    def _put_in(self, turn: Turn, name: bytes) -> None:
        turn.blocks[name] = None
        if turn.queue is not None:
            self.num_kept += turn.is_kept
        elif turn.freed >= 0:
            self._file(turn)
        self._limit_kept()

    def _take_out(self, turn: Turn, name: bytes) -> None:
        if turn.queue is not None:
            self.num_kept -= turn.is_kept
        del turn.blocks[name]
        if not turn.blocks:
            self._unfile(turn)

    def _unfile(self, turn: Turn) -> None:
        if turn.queue is not None:
            self.num_kept -= len(turn.blocks) * turn.is_kept
            del turn.queue[turn]
            if turn.is_kept and not turn.queue:
                del self._kept[turn.hints.tenant]
        turn.queue = None
        if turn is self._victim:
            self._victim = None

    def _heir(self, name: bytes) -> Turn | None:
        """The turn of a free block that builds on this one; None: there is none."""
        for child in self._children.get(name, ()):
            turn = self._turns.get(child)
            if turn is not None and child in turn.blocks:
                return turn
        return None

    def _least(self) -> Turn:
        """The turn whose blocks are evicted next."""
        if self._unwanted:
            return next(iter(self._unwanted))
        self._catch_up()
        value, clock, best, least = self.rates.value, self._clock, None, 0.0
        for (kind, age_bin), queue in self._cells.items():
            if queue:
                first = next(iter(queue))
                found = value(kind, age_bin, clock - first.freed)
                if best is None or (found, first.kind) < (least, best.kind):
                    best, least = first, found
        return best or self._least_kept()

    def _least_kept(self) -> Turn:
        """Of the tenant with the most kept blocks."""
        queue = max(self._kept.values(), key=_num_blocks)
        return max(queue, key=lambda turn: turn.hints.priority)  # the first of equals

    def _limit_kept(self) -> None:
        """Keep no more blocks than may be kept."""
        while self.num_kept > self._max_kept:
            self._keep_no_longer(self._least_kept())

    def _keep_no_longer(self, turn: Turn) -> None:
        if not turn.is_kept:
            return
        is_filed = turn.queue is not None
        self._unfile(turn)
        turn.is_kept = False
        if is_filed:
            self._file(turn)
        self._victim = None

    # Ages

    def _age(self, turn: Turn) -> None:
        """Count the age of a turn from now on."""
        turn.age_bin = bin_of(self._clock - turn.freed)
        if not turn.is_over:
            self.rates.note_reached(turn.kind, turn.age_bin)
        self._push(turn)

    def _push(self, turn: Turn) -> None:
        if turn.age_bin < NUM_BINS - 1:
            self._num_pushed += 1
            entry = (turn.freed + bin_end(turn.age_bin), self._num_pushed, turn)
            heappush(self._ageing, entry)

    def _catch_up(self) -> None:
        """Move the turns that have left the bins of their ages."""
        while self._ageing and self._ageing[0][0] <= self._clock:
            turn = heappop(self._ageing)[2]
            if turn.is_over and turn.queue is None:
                turn.age_bin = -1
                continue
            is_by_age = turn.queue is not None and turn.queue is self._cell_of(turn)
            if is_by_age:
                self._unfile(turn)
            turn.age_bin += 1
            if not turn.is_over:
                self.rates.note_reached(turn.kind, turn.age_bin)
            self._push(turn)
            if is_by_age:
                self._file(turn)

    def _cell_of(self, turn: Turn) -> TurnQueue:
        return self._cells.setdefault((turn.kind, turn.age_bin), OrderedDict())


def _num_blocks(queue: TurnQueue) -> int:
    return sum(len(turn.blocks) for turn in queue)
