"""Eviction order of cached KV blocks. Pure; used by worker pools and by the simulation.

A *turn* is the set of blocks that one request used last. Blocks are evicted in this order:

1. Blocks that another worker has copied because the chat continues there, unless other prefixes
   build on them or a request finds them again. The other worker's copy counts as an original, so
   the last copy is never evicted as a duplicate.
2. Blocks that their request marked as not needed again (``keep_s`` 0).
3. All other blocks, those with the lowest value of a next use first (``workers.kv.reuse_rates``):
   initially the least recently used, where the age of a turn that continued another counts half.
4. Blocks that a request asked to keep, until the keep time ends: first the tenant with the most
   of them, then the highest ``priority`` value, then the least recently used.

The last blocks of a turn are evicted first, as the end of a prefix is useless without its
beginning. If a block that builds on the chosen block belongs to another turn, the chosen block
moves to that turn instead of being evicted.
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
    """Assigns free blocks to turns and chooses the next block to evict.

    The age of a block is the number of blocks freed after it.

    Example: a, b, c are freed in this order, a was used by two requests, and another worker has a
    copy of c. c is evicted first, then b (age 1): the age of a counts half (2 * 0.5 = 1), and at
    equal values the block that was used only once is evicted first.
    """

    def __init__(self, used_rate: float = USED_RATE, max_kept: int = 0) -> None:
        """``used_rate``: see ``ReuseRates``. ``max_kept``: limit of blocks that requests may keep
        longer than others (``KeepHints.keep_s``), in equal parts by tenant.
        """
        self._ages = TurnAges(ReuseRates(used_rate))
        self._queues = TurnQueues(self._ages, max_kept)
        self._tree = PrefixTree()
        self._was_found: set[bytes] = set()
        self._is_duplicated: set[bytes] = set()
        self._duplicated: OrderedDict[bytes, None] = OrderedDict()
        self._turns: dict[bytes, Turn] = {}  # by block, if it was not found since it was freed

    @property
    def free(self) -> list[bytes]:
        """Names of the blocks that may be evicted."""
        return [*self._duplicated, *(name for turn in self._queues for name in turn.blocks)]

    @property
    def num_kept(self) -> int:
        """Number of free blocks that are kept longer than others."""
        return self._queues.num_kept

    def advance(self, now_s: float) -> None:
        """Set the monotonic time. Blocks with an expired keep time become ordinary free blocks."""
        self._queues.advance(now_s)

    # Blocks

    def learn(self, name: bytes, parent: bytes | None) -> None:
        """Add a held block that continues the prefix ending with ``parent`` (None: first block)."""
        self._tree.add(name, parent)

    def forget(self, name: bytes) -> None:
        """Remove a block, because its contents are lost or must not be found."""
        self.hold(name)
        self._tree.remove(name)
        self._turns.pop(name, None)
        self._was_found.discard(name)
        self._is_duplicated.discard(name)

    def find(self, name: bytes) -> None:
        """Note that a block was found and serves one more request."""
        self._was_found.add(name)
        self._is_duplicated.discard(name)
        turn = self._turns.get(name)
        if turn is not None and name not in turn.blocks:  # it is held
            del self._turns[name]

    def was_found(self, name: bytes) -> bool:
        """Whether a block was found since ``learn`` added it."""
        return name in self._was_found

    def hold(self, name: bytes) -> None:
        """Exclude a block from eviction until ``release``, since it has a holder."""
        if name in self._duplicated:
            del self._duplicated[name]
        elif (turn := self._turns.get(name)) is not None and name in turn.blocks:
            self._queues.remove(turn, name)

    def release(self, name: bytes, turn: Turn | None = None) -> None:
        """Make a block without holders evictable. Release the end of a prefix first.

        ``turn``: the turn of the last holder, if it was a request; call ``end`` after all its
        blocks are released. Without ``turn``, a block keeps its turn, unless a request found it
        since it was freed last.
        """
        self._ages.note_freed()
        if turn is None or (turn.hints.keep_s == 0 and name in self._was_found):
            turn = self._turns.get(name) or self._unobserved_turn(name)
        self._turns[name] = turn
        if name in self._is_duplicated:
            self._duplicated[name] = None
            return
        self._queues.put(turn, name)

    def leave(self, name: bytes, turn: Turn) -> None:
        """Assign a block that is still held to the turn of an ended request.

        The block joins this turn when it is free, unless another request uses it until then.
        """
        if turn.hints.keep_s != 0 or name not in self._was_found:
            self._turns[name] = turn

    def mark_duplicated(self, names: Sequence[bytes]) -> None:
        """Mark the blocks of a prefix, in order, as copied by another worker."""
        num_duplicated_children = 0
        for name in reversed(names):
            if name not in self._tree:
                continue
            if len(self._tree.children(name)) > num_duplicated_children:
                return  # other prefixes build on it
            self._is_duplicated.add(name)
            if (turn := self._turns.get(name)) is not None and name in turn.blocks:
                self._queues.remove(turn, name)
                self._duplicated[name] = None
            num_duplicated_children = 1

    def pop(self) -> bytes:
        """Return the next block to evict, which is then held. There must be a free block."""
        if self._duplicated:
            return self._duplicated.popitem(last=False)[0]
        while True:
            turn = self._queues.victim()
            name = next(iter(turn.blocks))
            dependent = self._dependent_turn(name)
            self._queues.remove(turn, name)
            if dependent is None:
                return name
            self._turns[name] = dependent
            self._queues.put(dependent, name)

    def _unobserved_turn(self, name: bytes) -> Turn:
        self._queues.choose_again()
        return self._ages.unobserved_turn(was_found=name in self._was_found)

    def _dependent_turn(self, name: bytes) -> Turn | None:
        """Return the turn of a free block that builds on this one, or None."""
        for child in self._tree.children(name):
            turn = self._turns.get(child)
            if turn is not None and child in turn.blocks:
                return turn
        return None

    # Turns

    def begin(self, names: Sequence[bytes], hints: KeepHints = NO_HINTS) -> Turn:
        """Begin the turn of a request. ``names``: all blocks of its prompt, in order."""
        if (before := self._ages.predecessor(names)) is not None:
            self._queues.move_aged()
        return self._ages.begin(names, hints, before)

    def end(self, turn: Turn) -> None:
        """End the turn of a request after its blocks are released."""
        self._queues.end(turn)

    def check_integrity(self, held: Iterable[bytes]) -> None:
        """Assert that each known block is either held or free."""
        free, known = self.free, self._tree.names
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free).isdisjoint(held), "a held block is evictable"
        assert {*free, *held} == known, "free and held are not all blocks"
        self._tree.check_integrity()
        for turn in self._queues:
            assert turn.blocks, "a turn without blocks is in an eviction queue"
            assert all(self._turns[name] is turn for name in turn.blocks), "turns are mixed up"
        assert self._turns.keys() <= known, "an unknown block has a turn"
        self._queues.check_integrity()
