"""Index and eviction order of the items of one tier. Pure; single-threaded.

The tier has a limit in bytes. An item is a KV block, named by its hash, or a recurrent state, named
by the ``state_key`` of the block before it, which is its parent. All tenants have equal shares. If
the tier is full, it first evicts items of a tenant that exceeds its share, in the order of
``workers.kv.eviction``. A tenant without a turn for ``IDLE_S`` has no share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.kv.eviction import EvictionOrder
from workers.kv.turns import Turn, TurnUse
from workers.requests.block_hash import state_key

IDLE_S = 3600.0
"""Time without a turn after which a tenant's items are evicted before others'."""


@dataclass(slots=True, eq=False)
class TierTurn:
    """A turn that puts items into a tier; its items are not evicted before it ends."""

    use: TurnUse
    turn: Turn
    held: dict[bytes, int] = field(default_factory=dict)
    """Held items of the turn, in order, with the number that ``TierIndex`` gave each of them."""


class TierIndex:
    """Decides which items of a tier are evicted when an item is added.

    Example: the capacity is 100 bytes; tenant a has 60 and b has 30. If b adds an item of 20 bytes,
    an item of a is evicted, as a has more than its share of 50.
    """

    def __init__(self, capacity_bytes: int, max_kept: int = 0) -> None:
        """``max_kept``: limit of items that one tenant's turns may keep longer than others."""
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        """Size of all items."""
        self._max_kept = max_kept
        self._now_s = 0.0
        self._orders: dict[str, EvictionOrder] = {}
        self._seen_s: dict[str, float] = {}
        self._sizes: dict[bytes, int] = {}
        self._numbers: dict[bytes, int] = {}
        self._num_added = 0
        self._owners: dict[bytes, str] = {}
        self._holders: Counter[bytes] = Counter()
        self._bytes: Counter[str] = Counter()
        self._free_bytes: Counter[str] = Counter()  # of items without a holder
        self._evicted: list[bytes] = []

    def __contains__(self, name: bytes) -> bool:
        return name in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def names(self) -> list[bytes]:
        return list(self._sizes)

    @property
    def num_kept(self) -> int:
        """Number of items that turns asked to keep longer than others."""
        return sum(order.num_kept for order in self._orders.values())

    def bytes_of(self, tenant: str) -> int:
        """Return the size of a tenant's items in bytes."""
        return self._bytes[tenant]

    def num_known(self, names: Sequence[bytes]) -> int:
        """Number of items, from the first name on, that the tier has."""
        known = self._sizes
        return next((i for i, name in enumerate(names) if name not in known), len(names))

    def begin(self, use: TurnUse, now_s: float) -> TierTurn:
        """Begin a turn and hold the items of its prefix until the turn ends."""
        self._now_s = max(now_s, self._now_s)
        for name, order in tuple(self._orders.items()):
            order.advance(self._now_s)
            self._drop_if_gone(name)
        tenant = use.hints.tenant
        self._seen_s[tenant] = self._now_s
        order = self._order_of(tenant)
        begun = TierTurn(use, order.begin(use.names[: use.num_prompt], use.hints))
        self._hold_known(begun)
        return begun

    def extend(self, turn: TierTurn, use: TurnUse) -> None:
        """Replace ``turn.use`` by a longer use, and hold its items until the turn ends."""
        turn.use = use
        self._hold_known(turn)

    def add(self, turn: TierTurn, name: bytes, parent: bytes | None, size: int) -> bool:
        """Add an item and hold it for the turn. This may evict others; see ``take_evicted``.

        Returns False if the parent is missing, or if not enough bytes can be evicted.
        """
        if name in self._sizes:
            if turn.held.get(name) != self._numbers[name]:
                self._hold(turn, name)
            return True
        tenant = turn.use.hints.tenant
        if parent is not None:
            if parent not in self._sizes:
                return False
            if turn.held.get(parent) != self._numbers[parent]:  # the turn skipped it
                self._hold_known(turn)
        if not self._evict_for(tenant, size):
            return False
        self._order_of(tenant).learn(name, parent)
        self._sizes[name], self._owners[name] = size, tenant
        self.num_bytes += size
        self._bytes[tenant] += size
        self._holders[name] = 1
        self._num_added += 1
        self._numbers[name] = turn.held[name] = self._num_added
        return True

    def take_evicted(self) -> list[bytes]:
        """Return the items evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def end(self, turn: TierTurn) -> None:
        """Release a turn's items, so that they can be evicted, the last ones first."""
        tenant = turn.use.hints.tenant
        for name, number in reversed(turn.held.items()):
            if self._numbers.get(name) != number:
                continue  # forgotten during the turn
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
                owner = self._owners[name]
                self._orders[owner].release(name, turn.turn if owner == tenant else None)
                self._free_bytes[owner] += self._sizes[name]
        if (order := self._orders.get(tenant)) is not None:  # else its tenant has gone
            order.end(turn.turn)

    def forget(self, name: bytes) -> None:
        """Remove an item, because it is lost or must not be used."""
        size, owner = self._sizes.pop(name), self._owners.pop(name)
        del self._numbers[name]
        self._orders[owner].forget(name)
        if not self._holders.pop(name, 0):
            self._free_bytes[owner] -= size
        self._bytes[owner] -= size
        self.num_bytes -= size
        self._drop_if_gone(owner)

    def check_integrity(self) -> None:
        """Assert that all counts are right, and that all items except held ones are evictable."""
        assert self.num_bytes == sum(self._sizes.values()) == self._bytes.total()
        assert self.num_bytes <= self.capacity_bytes, "a tier exceeds its capacity"
        assert self._owners.keys() == self._sizes.keys(), "an item has no owner"
        assert self._holders.keys() <= self._sizes.keys(), "an unknown item is held"
        free = [n for n in self._sizes if n not in self._holders]
        for tenant, order in self._orders.items():
            own = [n for n in free if self._owners[n] == tenant]
            assert sorted(order.free) == sorted(own), "free items are miscounted"
            assert self._free_bytes[tenant] == sum(self._sizes[n] for n in own)
            order.check_integrity([n for n in self._holders if self._owners[n] == tenant])

    def _order_of(self, tenant: str) -> EvictionOrder:
        order = self._orders.get(tenant)
        if order is None:
            order = self._orders[tenant] = EvictionOrder(max_kept=self._max_kept)
            self._seen_s.setdefault(tenant, self._now_s)
        return order

    def _drop_if_gone(self, tenant: str) -> None:
        """Remove an idle tenant without items."""
        if not self._bytes[tenant] and self._is_idle(tenant):
            for table in (self._orders, self._seen_s, self._bytes, self._free_bytes):
                table.pop(tenant, None)

    def _hold_known(self, turn: TierTurn) -> None:
        use = turn.use
        known = use.names[: self.num_known(use.names)]
        states = (state for state in map(state_key, use.states) if state in self._sizes)
        for name in (*known, *states):
            if turn.held.get(name) != self._numbers[name]:
                self._orders[self._owners[name]].find(name)
                self._hold(turn, name)

    def _hold(self, turn: TierTurn, name: bytes) -> None:
        if not self._holders[name]:
            owner = self._owners[name]
            self._orders[owner].hold(name)
            self._free_bytes[owner] -= self._sizes[name]
        self._holders[name] += 1
        turn.held[name] = self._numbers[name]

    def _evict_for(self, tenant: str, size: int) -> bool:
        """Evict items until ``size`` bytes are free, or return False if that is not possible."""
        held = self.num_bytes - self._free_bytes.total()
        if held + size > self.capacity_bytes:
            return False
        while self.num_bytes + size > self.capacity_bytes:
            victim = self._tenant_to_evict(tenant)
            if victim is None:
                return False
            name = self._orders[victim].pop()
            self.forget(name)
            self._evicted.append(name)
        return True

    def _tenant_to_evict(self, tenant: str) -> str | None:
        """Return the tenant from which an item is evicted for ``tenant``, or None."""
        able = [t for t, free in self._free_bytes.items() if free > 0]
        part = self.capacity_bytes / len({tenant, *(+self._bytes)})
        able = [t for t in able if t == tenant or self._is_idle(t) or self._bytes[t] > part]
        return max(able, key=lambda t: (self._is_idle(t), self._bytes[t]), default=None)

    def _is_idle(self, tenant: str) -> bool:
        return self._now_s - self._seen_s.get(tenant, self._now_s) >= IDLE_S
