"""Queues of turns with free blocks, in eviction order (see ``workers.kv.eviction``). Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush

from workers.kv.turn_ages import TurnAges
from workers.kv.turns import Turn, TurnQueue


class TurnQueues:
    """Chooses the turn to evict next and limits the blocks that are kept longer than others.

    At most ``max_kept`` free blocks are kept (``KeepHints.keep_s``), in equal shares by tenant.
    """

    def __init__(self, ages: TurnAges, max_kept: int) -> None:
        self.num_kept = 0
        """Number of free blocks that are kept longer than others."""
        self._max_kept = max_kept
        self._ages = ages
        self._now_s = 0.0
        self._unwanted: TurnQueue = OrderedDict()
        self._cells: dict[tuple[int, int], TurnQueue] = {}  # by kind and bin of the age
        self._kept: dict[str, TurnQueue] = {}  # by tenant
        self._victim: Turn | None = None
        self._expiring: list[tuple[float, int, Turn]] = []  # time, number, turn
        self._num_pushed = 0

    def __iter__(self) -> Iterator[Turn]:
        for queue in (self._unwanted, *self._cells.values(), *self._kept.values()):
            yield from queue

    def advance(self, now_s: float) -> None:
        """Set the monotonic time, and stop keeping turns whose keep time has expired."""
        self._now_s = now_s
        while self._expiring and self._expiring[0][0] <= now_s:
            self._keep_no_longer(heappop(self._expiring)[2])

    def end(self, turn: Turn) -> None:
        """End a turn, and queue it for eviction if it has free blocks."""
        keep_s = turn.hints.keep_s
        turn.is_kept = bool(keep_s)
        self.choose_again()
        self._ages.end(turn)
        if turn.blocks:
            self._file(turn)
        if keep_s:
            self._num_pushed += 1
            heappush(self._expiring, (self._now_s + keep_s, self._num_pushed, turn))
            self._limit_kept()

    def put(self, turn: Turn, name: bytes) -> None:
        """Add a free block to a turn, and queue the turn if it has ended."""
        turn.blocks[name] = None
        if turn.queue is not None:
            self.num_kept += turn.is_kept
        elif turn.freed >= 0:
            self._file(turn)
        self._limit_kept()

    def remove(self, turn: Turn, name: bytes) -> None:
        """Remove a block from a turn because it is no longer free."""
        if turn.queue is not None:
            self.num_kept -= turn.is_kept
        del turn.blocks[name]
        if not turn.blocks:
            self._unfile(turn)

    def victim(self) -> Turn:
        """Return the turn to evict next. It stays the victim until its last block is evicted."""
        if self._victim is None:
            self._victim = self._least()
        return self._victim

    def choose_again(self) -> None:
        """Choose a new victim at the next call of ``victim``. Call it after a turn is added."""
        self._victim = None

    def move_aged(self) -> None:
        """Move turns that are too old for their bin to the queue of the next bin."""
        for turn in self._ages.due():
            is_by_age = turn.queue is not None and turn.queue is self._cell_of(turn)
            if is_by_age:
                self._unfile(turn)
            self._ages.advance_bin(turn)
            if is_by_age:
                self._file(turn)

    def check_integrity(self) -> None:
        """Assert that the count of kept blocks is right and within the limit."""
        num_kept = sum(map(_num_blocks, self._kept.values()))
        assert num_kept == self.num_kept, "kept blocks are miscounted"
        assert num_kept <= self._max_kept, "too many blocks are kept"

    def _file(self, turn: Turn) -> None:
        """Put a turn with blocks into its queue."""
        if turn.age_bin < 0:
            self._ages.start(turn)
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

    def _unfile(self, turn: Turn) -> None:
        if turn.queue is not None:
            self.num_kept -= len(turn.blocks) * turn.is_kept
            del turn.queue[turn]
            if turn.is_kept and not turn.queue:
                del self._kept[turn.hints.tenant]
        turn.queue = None
        if turn is self._victim:
            self._victim = None

    def _least(self) -> Turn:
        if self._unwanted:
            return next(iter(self._unwanted))
        self.move_aged()
        oldest = (next(iter(queue)) for queue in self._cells.values() if queue)
        best = min(oldest, key=lambda turn: (self._ages.value(turn), turn.kind), default=None)
        return best or self._least_kept()

    def _least_kept(self) -> Turn:
        """Return the oldest turn of highest ``priority`` of the tenant that keeps most blocks."""
        queue = max(self._kept.values(), key=_num_blocks)
        return max(queue, key=lambda turn: turn.hints.priority)  # the first of equals

    def _limit_kept(self) -> None:
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

    def _cell_of(self, turn: Turn) -> TurnQueue:
        return self._cells.setdefault((turn.kind, turn.age_bin), OrderedDict())


def _num_blocks(queue: TurnQueue) -> int:
    return sum(len(turn.blocks) for turn in queue)
