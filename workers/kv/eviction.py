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
from collections.abc import Iterable, Sequence

from workers.kv.prefix_tree import PrefixTree
from workers.kv.reuse_rates import USED_RATE, ReuseRates
from workers.kv.turn_ages import TurnAges
from workers.kv.turn_queues import TurnQueues
from workers.kv.turns import NO_HINTS, KeepHints, Turn


class EvictionOrder:
    """Decides to which turn a free block belongs, and which block is evicted next.

    Age is counted in blocks freed.

    Example: a, b, c are freed in this order, a was found before, and c is lent: c goes first, then
    b (age 1), since the age of a counts half (2 * 0.5 = 1, and the newer kind goes first).
    """

    def __init__(self, used_rate: float = USED_RATE, max_kept: int = 0) -> None:
        """``used_rate``: see ``ReuseRates``. ``max_kept``: blocks that requests may have kept
        before others (``KeepHints.keep_s``), in equal parts by tenant.
        """
        self._ages = TurnAges(ReuseRates(used_rate))
        self._queues = TurnQueues(self._ages, max_kept)
        self._tree = PrefixTree()
        self._was_found: set[bytes] = set()
        self._is_lent: set[bytes] = set()
        self._lent: OrderedDict[bytes, None] = OrderedDict()
        self._turns: dict[bytes, Turn] = {}  # of blocks that were not found since they were freed

    @property
    def free(self) -> list[bytes]:
        """Blocks that may be evicted."""
        return [*self._lent, *(name for turn in self._queues for name in turn.blocks)]

    @property
    def num_kept(self) -> int:
        """Free blocks that are kept before others."""
        return self._queues.num_kept

    def advance(self, now_s: float) -> None:
        """The time, for blocks that are kept for a while; it never goes back."""
        self._queues.advance(now_s)

    # Blocks

    def learn(self, name: bytes, parent: bytes | None) -> None:
        """A block has contents now, which build on ``parent``."""
        self._tree.add(name, parent)

    def forget(self, name: bytes) -> None:
        """A block's contents are gone, or must not be found."""
        self.hold(name)
        self._tree.remove(name)
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
            self._queues.remove(turn, name)

    def release(self, name: bytes, turn: Turn | None = None) -> None:
        """A block has no holder any more. Release the end of a prefix first.

        ``turn`` is that of its last holder, if this was a request; call ``end`` once all its blocks
        are released. Otherwise a block that was not found meanwhile returns to its turn.
        """
        self._ages.note_freed()
        if turn is None or (turn.hints.keep_s == 0 and name in self._was_found):
            turn = self._turns.get(name) or self._lone_turn(name)
        self._turns[name] = turn
        if name in self._is_lent:
            self._lent[name] = None
            return
        self._queues.put(turn, name)

    def leave(self, name: bytes, turn: Turn) -> None:
        """A request has ended, and others still hold a block that it had: unless one of them is a
        request, or it is found meanwhile, the block goes to this turn when it is free."""
        if turn.hints.keep_s != 0 or name not in self._was_found:
            self._turns[name] = turn

    def lend(self, names: Sequence[bytes]) -> None:
        """Another worker has a copy of this prefix, whose blocks are named in order."""
        num_lent_children = 0
        for name in reversed(names):
            if name not in self._tree:
                continue
            if len(self._tree.children(name)) > num_lent_children:
                return  # other prefixes build on it
            self._is_lent.add(name)
            if (turn := self._turns.get(name)) is not None and name in turn.blocks:
                self._queues.remove(turn, name)
                self._lent[name] = None
            num_lent_children = 1

    def pop(self) -> bytes:
        """The block to evict, which is held from now on. There must be a free one."""
        if self._lent:
            return self._lent.popitem(last=False)[0]
        while True:
            turn = self._queues.victim()
            name = next(iter(turn.blocks))
            heir = self._heir(name)
            self._queues.remove(turn, name)
            if heir is None:
                return name
            self._turns[name] = heir
            self._queues.put(heir, name)

    def _lone_turn(self, name: bytes) -> Turn:
        self._queues.choose_again()
        return self._ages.lone_turn(was_found=name in self._was_found)

    def _heir(self, name: bytes) -> Turn | None:
        """The turn of a free block that builds on this one; None: there is none."""
        for child in self._tree.children(name):
            turn = self._turns.get(child)
            if turn is not None and child in turn.blocks:
                return turn
        return None

    # Turns

    def begin(self, names: Sequence[bytes], hints: KeepHints = NO_HINTS) -> Turn:
        """A request begins whose prompt has these blocks, known ones and others, in order."""
        if (before := self._ages.predecessor(names)) is not None:
            self._queues.move_aged()
        return self._ages.begin(names, hints, before)

    def end(self, turn: Turn) -> None:
        """A request has ended, and its blocks are released."""
        self._queues.end(turn)

    def check_integrity(self, held: Iterable[bytes]) -> None:
        """Assert that the known blocks are those held and those free, each once."""
        free, known = self.free, self._tree.names
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free).isdisjoint(held), "a held block may be given up"
        assert {*free, *held} == known, "free and held are not all blocks"
        self._tree.check_integrity()
        for turn in self._queues:
            assert turn.blocks, "a turn without blocks waits for its eviction"
            assert all(self._turns[name] is turn for name in turn.blocks), "turns are mixed up"
        assert self._turns.keys() <= known, "an unknown block has a turn"
        self._queues.check_integrity()
