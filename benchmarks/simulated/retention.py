"""Which prefixes a cache keeps, simulated: the product's own order beside the ideal one.

python -m benchmarks.run --only retention

One cache of 10, 25 or 50% of the blocks that a trace ever uses serves its requests one after the
other: a request finds the blocks from its first one on that are there, and leaves all its full
blocks. The ideal is Belady's: it knows the future, and gives up the block that is used last. All
numbers are blocks found, as a part of those that the ideal finds. LRU gives up the least recently
used block; the product's order (`workers/kv/eviction.py`) learns from the trace as it goes.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from benchmarks.report.results import table
from benchmarks.simulated.agent_trace import AgentRequest, agent_sessions, one_shots
from benchmarks.simulated.request_trace import BLOCK_TOKENS, TracedRequest, conversations
from workers.kv.eviction import EvictionOrder
from workers.kv.tiers.index import TierIndex
from workers.kv.turns import KeepHints, TurnUse
from workers.requests.block_hash import SHORT_BYTES

SIZES = (0.1, 0.25, 0.5)
"""Parts of the working set that a cache holds."""
TIERS = {"pool": 0.1, "host": 0.25, "disk": 0.5}
"""Tiers of one worker, as parts of the working set. Each lower tier has copies of what the higher
ones hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """What a request uses of a cache."""

    time_s: float
    names: Sequence[bytes]
    """Its full blocks."""
    session: str
    is_last: bool
    """Nobody continues it."""


def uses_of(requests: Sequence[TracedRequest], one_in: int = 1) -> list[Use]:
    """Requests in the order of arrival; which of them is a last one is known in hindsight.

    Of ``one_in`` blocks one is replayed.
    """
    blocks = [r.blocks[: r.prompt_tokens // BLOCK_TOKENS : one_in] for r in requests]
    used_later, found = set[int](), list[Use]()
    for request, own in zip(reversed(requests), reversed(blocks), strict=True):
        found.append(
            Use(
                time_s=request.time_s,
                names=[block.to_bytes(SHORT_BYTES, "big") for block in own],
                session=request.session if isinstance(request, AgentRequest) else "",
                is_last=not own or own[-1] not in used_later,
            )
        )
        used_later.update(own)
    return found[::-1]


class Cache:
    """A cache that evicts in the product's order."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._order = EvictionOrder(max_kept=num_blocks // 2)
        self._here: set[bytes] = set()
        self.gone: list[bytes] = []
        """Blocks that gave way to the last request."""

    def has(self, name: bytes) -> bool:
        """Whether a block is here."""
        return name in self._here

    def num_found(self, names: Sequence[bytes]) -> int:
        """Blocks from the first on that are here."""
        return next((i for i, name in enumerate(names) if name not in self._here), len(names))

    def serve(self, use: Use, hints: KeepHints) -> int:
        """Blocks that a request finds; it leaves all of its own."""
        order, names, found = self._order, use.names, self.num_found(use.names)
        order.advance(use.time_s)
        turn = order.begin(names, hints)
        for place, name in enumerate(names):
            if name in self._here:
                order.hold(name)
            else:
                order.learn(name, names[place - 1] if place else None)
            if place < found:
                order.find(name)
        for name in reversed(names):  # the end of a prefix goes first
            order.release(name, turn)
        order.end(turn)
        self._here.update(names)
        self.gone = []
        while len(self._here) > self._num_blocks:
            gone = order.pop()
            order.forget(gone)
            self._here.remove(gone)
            self.gone.append(gone)
        return found


class TierCache:
    """A lower tier, in the product's order; one block is one byte."""

    def __init__(self, num_blocks: int) -> None:
        self._order = TierIndex(num_blocks, max_kept=num_blocks // 2)
        self.gone: list[bytes] = []
        """Blocks that gave way to the last request."""

    def has(self, name: bytes) -> bool:
        """Whether a block is here."""
        return name in self._order

    def serve(self, use: Use, hints: KeepHints) -> int:
        """Blocks that a request finds; it leaves all of its own, as far as there is room."""
        names, order = use.names, self._order
        found = order.num_known(names)
        left = TurnUse(names=names, num_prompt=len(names), hints=hints)
        turn = order.begin(left, use.time_s)
        for name, parent in left.items:
            if not order.add(turn, name, parent, size=1):
                break
        order.end(turn)
        self.gone = order.take_evicted()
        return found


Hinted = Callable[[Use], KeepHints]
"""What a request says."""


def no_hints(use: Use) -> KeepHints:
    return KeepHints()


def sessions(use: Use) -> KeepHints:
    """Every turn names its session."""
    return KeepHints(session=use.session)


def some_ends(part: float, seed: int = 0) -> Hinted:
    """A part of the last turns say that they are: ``cache_ttl`` 0."""
    draw = random.Random(seed)

    def hinted(use: Use) -> KeepHints:
        is_known = use.is_last and draw.random() < part
        return KeepHints(session=use.session, keep_s=0.0 if is_known else None)

    return hinted


def found_blocks(uses: Sequence[Use], num_blocks: int, hinted: Hinted = no_hints) -> int:
    """Blocks that requests find in the product's order."""
    cache = Cache(num_blocks)
    return sum(cache.serve(use, hinted(use)) for use in uses)


def lru_blocks(uses: Sequence[Use], num_blocks: int) -> int:
    """Blocks that they find where the least recently used is given up."""
    here: OrderedDict[bytes, None] = OrderedDict()
    found = 0
    for use in uses:
        names = use.names
        found += next((i for i, name in enumerate(names) if name not in here), len(names))
        for name in reversed(names):
            here[name] = None
            here.move_to_end(name)
        while len(here) > num_blocks:
            here.popitem(last=False)
    return found


def ideal_blocks(uses: Sequence[Use], num_blocks: int) -> int:
    """Blocks that they find where the future is known.

    Source: Belady, "A Study of Replacement Algorithms for a Virtual-Storage Computer" (1966). A
    block that is never used again is not kept, and of a prefix the end goes first.
    """
    never, later = len(uses), dict[bytes, int]()
    next_uses: list[list[int]] = []
    for place in range(len(uses) - 1, -1, -1):
        next_uses.append([later.get(name, never) for name in uses[place].names])
        later.update(dict.fromkeys(uses[place].names, place))
    here: dict[bytes, int] = {}
    queue: list[tuple[int, int, bytes]] = []
    found = 0
    for use, nexts in zip(uses, reversed(next_uses), strict=True):
        names = use.names
        found += next((i for i, name in enumerate(names) if name not in here), len(names))
        for depth, (name, following) in enumerate(zip(names, nexts, strict=True)):
            here.pop(name, None)
            if following < never:
                here[name] = following
                heappush(queue, (-following, -depth, name))
        while len(here) > num_blocks:
            following, _, name = heappop(queue)
            if here.get(name) == -following:
                del here[name]
    return found


def tier_blocks(uses: Sequence[Use], working_set: int, hinted: Hinted) -> dict[str, int]:
    """Blocks that they find in each tier beyond those of the tiers before."""
    sizes = {name: int(working_set * part) for name, part in TIERS.items()}
    caches = {n: (Cache if n == "pool" else TierCache)(size) for n, size in sizes.items()}
    found = dict.fromkeys(TIERS, 0)
    for use in uses:
        hints, before = hinted(use), 0
        for name, cache in caches.items():
            here = cache.serve(use, hints)
            found[name] += max(here - before, 0)
            before = max(here, before)
    return found


def working_set(uses: Sequence[Use]) -> int:
    """Blocks that are ever used."""
    return len({name for use in uses for name in use.names})


def section(quick: bool) -> str:
    """The section of its page."""
    head = ["trace, order", *(f"{size:.0%}" for size in SIZES)]
    rows, tiers = [], []
    for trace, requests in traces(quick).items():
        uses = uses_of(requests, 32 if quick else 1)
        size = working_set(uses)
        ideal = [ideal_blocks(uses, int(size * part)) for part in SIZES]
        total = sum(len(use.names) for use in uses)
        rows.append([f"{trace}: the ideal, of all blocks", *(f"{n / total:.3f}" for n in ideal)])
        lru = [lru_blocks(uses, int(size * part)) for part in SIZES]
        rows.append(_row(f"{trace}: least recently used", lru, ideal))
        for name, hinted in _HINTS.items():
            found = [found_blocks(uses, int(size * part), hinted) for part in SIZES]
            rows.append(_row(f"{trace}: `expertmesh`, {name}", found, ideal))
        by_tier = tier_blocks(uses, size, no_hints)
        cells = [f"{count / ideal[-1]:.3f}" for count in by_tier.values()]
        tiers.append([trace, *cells, f"{sum(by_tier.values()) / ideal[-1]:.3f}"])
    return "\n\n".join(
        [
            "## Retention, simulated",
            " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
            "The agents are made up as published statistics describe them: see "
            "`benchmarks/simulated/agent_trace.py`. Documents are requests that nobody continues, "
            "half a second's worth of them for each turn of an agent.",
            table(head, rows),
            "Three tiers of one worker without hints, each with copies of what is above it; parts "
            "of what the ideal finds with the largest one.",
            table(["trace", *(f"{name} {part:.0%}" for name, part in TIERS.items()), "all"], tiers),
        ]
    )


_HINTS = {
    "no hints": no_hints,
    "sessions": sessions,
    "half of the ends": some_ends(0.5),
    "all ends": some_ends(1.0),
}
"""What requests say, by name in the table."""


def traces(quick: bool) -> dict[str, Sequence[TracedRequest]]:
    """What is replayed, by name in the table."""
    agents = agent_sessions(1, 4 if quick else 150)
    documents = one_shots(1, agents[-1].time_s, 0.02 if quick else 0.3)
    mixed = sorted([*agents, *documents], key=lambda request: request.time_s)
    return {
        "conversations": conversations()[: 300 if quick else None],
        "agents": agents,
        "agents and documents": mixed,
    }


def _row(name: str, found: Sequence[int], ideal: Sequence[int]) -> list[str]:
    return [name, *(f"{own / best:.3f}" for own, best in zip(found, ideal, strict=True))]
