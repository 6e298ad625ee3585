"""Simulated eviction: the blocks found with the product's eviction order and with the ideal one.

python -m benchmarks.run --only retention

One cache serves the requests of a trace in order. It holds 10, 25 or 50% of all different blocks of
the trace. A request finds the longest prefix of its blocks that is cached, and adds all its full
blocks. The ideal order (Belady's) knows the future and evicts the block whose next use is last. The
first row of each trace has the blocks that the ideal order finds, as a fraction of the blocks of
all requests; the other rows are fractions of this number. `expertmesh` is the product's order
(`workers/kv/eviction.py`), which learns from the trace as it runs.
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
"""Fractions of the working set that a cache holds."""
TIERS = {"pool": 0.1, "host": 0.25, "disk": 0.5}
"""Sizes of a worker's tiers as fractions of the working set. A lower tier has copies of the blocks
of the higher tiers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One request of a trace, as a cache sees it."""

    time_s: float
    names: Sequence[bytes]
    """Its full blocks."""
    session: str
    is_last: bool
    """Whether no later request continues this one."""


def uses_of(requests: Sequence[TracedRequest], one_in: int = 1) -> list[Use]:
    """Return the requests in the order of arrival, with ``is_last`` set from the whole trace.

    Only one of ``one_in`` blocks is replayed.
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
        """Blocks that the last request evicted."""

    def has(self, name: bytes) -> bool:
        """Whether a block is cached."""
        return name in self._here

    def num_found(self, names: Sequence[bytes]) -> int:
        """Number of leading blocks that are cached."""
        return next((i for i, name in enumerate(names) if name not in self._here), len(names))

    def serve(self, use: Use, hints: KeepHints) -> int:
        """Serve a request and cache its blocks; returns the number of blocks that it found."""
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
        """Blocks that the last request evicted."""

    def has(self, name: bytes) -> bool:
        """Whether a block is cached."""
        return name in self._order

    def serve(self, use: Use, hints: KeepHints) -> int:
        """Serve a request, cache the blocks that fit; returns the number of blocks it found."""
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
"""Returns the hints that a request sends."""


def no_hints(use: Use) -> KeepHints:
    return KeepHints()


def sessions(use: Use) -> KeepHints:
    """Every turn names its session."""
    return KeepHints(session=use.session)


def some_ends(part: float, seed: int = 0) -> Hinted:
    """Hints with which a fraction ``part`` of the last turns send ``cache_ttl`` 0."""
    draw = random.Random(seed)

    def hinted(use: Use) -> KeepHints:
        is_known = use.is_last and draw.random() < part
        return KeepHints(session=use.session, keep_s=0.0 if is_known else None)

    return hinted


def found_blocks(uses: Sequence[Use], num_blocks: int, hinted: Hinted = no_hints) -> int:
    """Number of blocks that requests find with the product's order."""
    cache = Cache(num_blocks)
    return sum(cache.serve(use, hinted(use)) for use in uses)


def lru_blocks(uses: Sequence[Use], num_blocks: int) -> int:
    """Number of blocks that requests find if the least recently used block is evicted."""
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
    """Number of blocks that requests find with the ideal order.

    Source: Belady, "A Study of Replacement Algorithms for a Virtual-Storage Computer" (1966). A
    block that is never used again is not kept, and the end of a prefix is evicted first.
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
    """Number of blocks that requests find in each tier and not in a higher one."""
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
    """Number of different blocks in a trace."""
    return len({name for use in uses for name in use.names})


def section(quick: bool) -> str:
    """Return the Markdown section."""
    head = ["trace: eviction order", *(f"cache of {size:.0%}" for size in SIZES)]
    rows, tiers = [], []
    for trace, requests in traces(quick).items():
        uses = uses_of(requests, 32 if quick else 1)
        size = working_set(uses)
        ideal = [ideal_blocks(uses, int(size * part)) for part in SIZES]
        total = sum(len(use.names) for use in uses)
        rows.append(
            [f"{trace}: ideal order, fraction of all blocks", *(f"{n / total:.3f}" for n in ideal)]
        )
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
            "Conversations are the public Mooncake trace. Agents are sessions generated from "
            "published statistics (`benchmarks/simulated/agent_trace.py`). Documents are single "
            "requests that no other request continues. With *no hints*, requests do not name their "
            "sessions; with *sessions*, they do; in the last two rows, they also mark half or all "
            "of the last turns of sessions (`cache_ttl` 0).",
            table(head, rows),
            "Three tiers of one worker without hints: blocks found in each tier and not in a "
            "tier above it, as a fraction of the blocks that the ideal order finds with 50%.",
            table(
                ["trace", *(f"{name} {part:.0%}" for name, part in TIERS.items()), "all tiers"],
                tiers,
            ),
        ]
    )


_HINTS = {
    "no hints": no_hints,
    "sessions": sessions,
    "half of the last turns": some_ends(0.5),
    "all last turns": some_ends(1.0),
}
"""Label in the table -> hints of the requests."""


def traces(quick: bool) -> dict[str, Sequence[TracedRequest]]:
    """Label in the table -> requests of the trace."""
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
