"""Copies what turns leave from the pool into the tiers, without holding up a step.

When a turn ends, the engine's thread only notes the names of its blocks. Between steps it holds a
few of those that the tiers lack, and a thread of its own copies them. Blocks that are gone by then
are left out.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.kv.tiers.order import TierTurn
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.store import KvTransferStore, LentState
from workers.kv.turns import TurnUse
from workers.requests.block_hash import state_key

logger = logging.getLogger(__name__)

MAX_HELD = 64
"""Blocks that are held and copied at a time."""
_FREE_SHARE = 8
"""Of the free blocks one in so many is held at most."""
MAX_TURNS = 1024
"""Turns that may wait; later ones are left out."""


@dataclass(slots=True, eq=False)
class _Copy:
    """A turn whose blocks are copied."""

    use: TurnUse
    turn: TierTurn | None = None
    """Of the executor's thread; None: it has not begun."""
    num_done: int = 0
    """Blocks from the first on that are in the tiers."""
    num_states_done: int = 0
    """States from the first on that are, or cannot be."""


@dataclass(slots=True, eq=False)
class _Batch:
    """What is held and copied, or the end of a turn."""

    copy: _Copy
    blocks: list[int]
    state: LentState | None
    work: Future[bool]
    """Whether more of the turn can be kept."""


class TurnCopies:
    """See the module. All methods belong to the engine's thread.

    Args:
        store: holds blocks of the pool, and states.
        tiers: where they go.
        wake: called, by another thread, when ``go_on`` should be.
    """

    def __init__(self, store: KvTransferStore, tiers: KvTiers, wake: Callable[[], None]) -> None:
        self._store = store
        self._tiers = tiers
        self._wake = wake
        self._waiting: deque[_Copy] = deque()
        self._batch: _Batch | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-copier")

    @property
    def is_idle(self) -> bool:
        """Nothing is copied, and nothing waits."""
        return self._batch is None and not self._waiting

    def note(self, use: TurnUse) -> None:
        """A turn has ended, and left these blocks."""
        if use.hints.keep_s == 0:  # nobody will use them again: what is here is only let go
            num_here = len(self._tiers.tiers_of(use.names))
            use = replace(use, names=use.names[:num_here], states=())
        if len(self._waiting) == MAX_TURNS:
            self._tiers.host.num_skipped += len(use.names)
            return
        self._waiting.append(_Copy(use))
        self._wake()

    def go_on(self) -> None:
        """Let go of what is copied, and hold the next blocks."""
        if self._batch is not None and self._batch.work.done():
            self._end_batch(self._batch)
        if self._batch is None and self._waiting:
            self._begin_batch(self._waiting[0])

    def close(self) -> None:
        """Copy nothing more."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _begin_batch(self, copy: _Copy) -> None:
        """Hold and copy the next blocks of a turn, or end it where there are none."""
        names, host = copy.use.names, self._tiers.host
        while copy.num_done < len(names) and host.has(names[copy.num_done]):
            copy.num_done += 1
        blocks, state = self._lend_next(copy)
        is_over = not blocks and state is None  # all is there, or gone
        begun = (self._end, copy) if is_over else (self._copy, copy, blocks, state)
        work = self._executor.submit(*begun)
        work.add_done_callback(lambda ended: self._wake())
        self._batch = _Batch(copy, blocks, state, work)

    def _lend_next(self, copy: _Copy) -> tuple[list[int], LentState | None]:
        """The next blocks, or the next state once they are done."""
        use, host = copy.use, self._tiers.host
        if copy.num_done < len(use.names):
            most = max(min(MAX_HELD, self._store.pool.num_free // _FREE_SHARE), 1)
            return self._store.lend(use.names[copy.num_done : copy.num_done + most]), None
        for name in use.states[copy.num_states_done :]:
            copy.num_states_done += 1
            key = state_key(name)
            if not host.has(key) and (state := self._store.lend_state([key])) is not None:
                return [], state
        return [], None

    def _end_batch(self, batch: _Batch) -> None:
        copy, pool = batch.copy, self._store.pool
        names = copy.use.names[copy.num_done : copy.num_done + len(batch.blocks)]
        held = zip(batch.blocks, names, strict=True)
        self._tiers.forget([name for block, name in held if pool.hash_of(block) != name])
        if batch.blocks:
            self._store.end_loan(batch.blocks, 0)
        if batch.state is not None:
            self._store.end_state_loan(batch.state, is_kept=False)
        self._batch = None
        copy.num_done += len(batch.blocks)
        if batch.work.cancelled() or not batch.work.result():
            self._waiting.remove(copy)

    def _copy(self, copy: _Copy, blocks: list[int], state: LentState | None) -> bool:
        """In the executor's thread; False where the turn has ended, as no more can be kept."""
        names, cache = copy.use.names, self._store.cache
        try:
            turn = self._begun(copy)
            for place, block in enumerate(blocks, copy.num_done):
                parent = names[place - 1] if place else None
                if not self._put(turn, names[place], parent, cache.read_block(block)):
                    return self._end(copy)
            if state is not None:
                name = copy.use.states[copy.num_states_done - 1]
                if not self._put(turn, state_key(name), name, cache.read_state(state.slot)):
                    return self._end(copy)
        except Exception:  # memory that is missing, for example: the worker serves on
            logger.exception("KV blocks are not kept")
            return self._end(copy)
        return True

    def _begun(self, copy: _Copy) -> TierTurn:
        if copy.turn is None:
            copy.turn = self._tiers.begin(copy.use)
        return copy.turn

    def _end(self, copy: _Copy) -> bool:
        """In the executor's thread: what is not in the tiers now is left out."""
        try:
            self._tiers.end(self._begun(copy))
        except Exception:  # as above
            logger.exception("what a turn has kept is not let go")
        return False

    def _put(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        return self._tiers.put(turn, name, parent, as_bytes(data))


def as_bytes(data: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as the tiers keep it."""
    return data.view(torch.uint8).flatten()
