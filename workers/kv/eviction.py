"""The order in which cached KV blocks are evicted. Pure; for worker pools and for the simulation.

Least recently used first, with two exceptions:

- A block that was found again counts as ``USED_AGE`` of its age: what served two requests is twice
  as likely to serve a third one as what served one (on the Mooncake trace 0.6 against 0.24 within
  ten minutes).
- A block that was lent to another worker is evicted before all others: the borrower has a copy, and
  the chat continues there. This does not hold where other prefixes build on the block, or once it
  is found again. The borrower's copy counts as an original, so the last copy is never evicted as a
  duplicate.

Blocks build on each other, and the end of a prefix is useless without its beginning: an end is
always evicted before the block it builds on.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

USED_AGE = 0.5
"""Part of its age that counts where a block was found again."""


class EvictionOrder:
    """Blocks by name, and those of them that may be evicted. Age is counted in blocks freed.

    Example: a, b, c are freed in this order, a was found before, and c is lent: c goes first, then
    b (age 1), since the age of a counts half (2 * 0.5 = 1, and the newer kind goes first).
    """

    def __init__(self, used_age: float = USED_AGE) -> None:
        """``used_age`` 1 makes no difference between blocks that were found and others."""
        self._used_age = used_age
        self._clock = 0
        self._parents: dict[bytes, bytes | None] = {}
        self._num_children: Counter[bytes] = Counter()
        self._was_found: set[bytes] = set()
        self._is_lent: set[bytes] = set()
        self._lent: OrderedDict[bytes, int] = OrderedDict()
        self._new: OrderedDict[bytes, int] = OrderedDict()
        self._used: OrderedDict[bytes, int] = OrderedDict()

    @property
    def free(self) -> list[bytes]:
        """Blocks that may be evicted."""
        return [*self._lent, *self._new, *self._used]

    def learn(self, name: bytes, parent: bytes | None) -> None:
        """A block has contents now, which build on ``parent``."""
        self._parents[name] = parent
        if parent is not None:
            self._num_children[parent] += 1

    def forget(self, name: bytes) -> None:
        """A block's contents are gone, or must not be found."""
        self.hold(name)
        parent = self._parents.pop(name)
        if parent is not None:
            self._num_children[parent] -= 1
            if not self._num_children[parent]:
                del self._num_children[parent]
        self._was_found.discard(name)
        self._is_lent.discard(name)

    def find(self, name: bytes) -> None:
        """A block was found: it serves one more request."""
        self._was_found.add(name)
        self._is_lent.discard(name)

    def was_found(self, name: bytes) -> bool:
        """Whether a block was found since it has these contents."""
        return name in self._was_found

    def hold(self, name: bytes) -> None:
        """A block has a holder now: it cannot be evicted."""
        for queue in (self._new, self._used, self._lent):
            if queue.pop(name, None) is not None:
                return

    def release(self, name: bytes) -> None:
        """A block has no holder any more. Release the end of a prefix first."""
        self._clock += 1
        self._queue(name)[name] = self._clock

    def lend(self, names: Sequence[bytes]) -> None:
        """Another worker has a copy of this prefix, whose blocks are named in order."""
        num_lent_children = 0
        for name in reversed(names):
            if name not in self._parents:
                continue
            if self._num_children[name] > num_lent_children:
                return  # other prefixes build on it
            self._is_lent.add(name)
            for queue in (self._new, self._used):
                if (freed := queue.pop(name, None)) is not None:
                    self._lent[name] = freed
            num_lent_children = 1

    def pop(self) -> bytes:
        """The block to evict, which is held from now on. There must be a free one."""
        if self._lent:
            return self._lent.popitem(last=False)[0]
        used, new = self._age(self._used) * self._used_age, self._age(self._new)
        return (self._new if new >= used else self._used).popitem(last=False)[0]

    def check_integrity(self, held: Iterable[bytes]) -> None:
        """Assert that the known blocks are those held and those free, each once."""
        free = self.free
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free).isdisjoint(held), "a held block may be given up"
        assert {*free, *held} == self._parents.keys(), "free and held are not all blocks"
        children = Counter(p for p in self._parents.values() if p is not None)
        assert children == self._num_children, "blocks that build on others are miscounted"

    def _queue(self, name: bytes) -> OrderedDict[bytes, int]:
        if name in self._is_lent:
            return self._lent
        return self._used if name in self._was_found else self._new

    def _age(self, queue: OrderedDict[bytes, int]) -> float:
        """Age of a queue's oldest; negative where it is empty."""
        return self._clock - next(iter(queue.values())) if queue else -1.0
