"""Copies what turns leave from the pool into the tiers, without holding up a step.

When a prompt is computed, and when its turn ends, the engine's thread only notes the names of the
blocks. Between steps it holds some of those that the tiers lack, and a thread of its own copies
them: those of a prompt while its sequence runs, as nothing can take them meanwhile, and those of
the output after its end. Blocks that are gone by then are left out.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.kv.tiers.order import TierTurn
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.store import KvTransferStore, LentState
from workers.kv.turns import TurnUse
from workers.requests.block_hash import BlockHash, state_key
from workers.requests.sequence import SequenceState

logger = logging.getLogger(__name__)

MAX_HELD = 64
"""Blocks of a turn that are held and copied at a time."""
MAX_BATCHES = 8
"""Turns whose blocks are held at a time: there may be no other time before the end of a step."""
_FREE_SHARE = 8
"""Of the free blocks one in so many is held at most, for turns that have ended."""
_RUNNING_SHARE = 0.5
"""Part of host memory that turns hold while they run, at most."""
MAX_TURNS = 1024
"""Turns that may wait; later ones are left out."""


@dataclass(slots=True, eq=False)
class _Copy:
    """A turn whose blocks are copied."""

    use: TurnUse
    """Of its prompt while its sequence runs."""
    has_ended: bool
    """Its sequence runs no more."""
    is_busy: bool = False
    """A batch of its blocks is on the way."""
    is_left: bool = False
    """It is done: all was kept that could be."""
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
    names: Sequence[BlockHash]
    """Of its blocks."""
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
        self._running: dict[SequenceState, _Copy] = {}
        """Copies of those that run; they may wait as well."""
        self._batches: deque[_Batch] = deque()
        """Oldest first, as they are copied."""
        self._on_way: set[BlockHash] = set()
        """Their blocks."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-copier")

    @property
    def is_idle(self) -> bool:
        """Nothing is copied, and nothing waits."""
        return not self._batches and not self._waiting

    def prompt_done(self, sequence: SequenceState, use: TurnUse) -> None:
        """See ``TurnListener``."""
        if use.hints.keep_s != 0 and len(self._waiting) < MAX_TURNS and self._may_hold(use):
            self._running[sequence] = copy = _Copy(use, has_ended=False)
            self._go_on_with(copy)

    def ended(self, sequence: SequenceState, use: TurnUse) -> None:
        """See ``TurnListener``."""
        copy = self._running.pop(sequence, None)
        if copy is None:
            self._note(use)
            return
        copy.use, copy.has_ended = use, True
        self._go_on_with(copy)

    def stopped(self, sequence: SequenceState) -> None:
        """See ``TurnListener``. What is copied of its prompt stays."""
        if (copy := self._running.pop(sequence, None)) is not None:
            copy.has_ended = True
            self._go_on_with(copy)

    def _may_hold(self, use: TurnUse) -> bool:
        """Whether host memory, from which nothing of a running turn gives way, has room for it."""
        num_blocks = sum(len(copy.use.names) for copy in self._running.values()) + len(use.names)
        num_bytes = num_blocks * self._store.cache.block_bytes
        return num_bytes <= self._tiers.host.capacity_bytes * _RUNNING_SHARE

    def _go_on_with(self, copy: _Copy) -> None:
        if not copy.is_left and copy not in self._waiting:
            self._waiting.append(copy)
        self._wake()

    def _note(self, use: TurnUse) -> None:
        """A turn has ended of which nothing was copied before."""
        if use.hints.keep_s == 0:  # nobody will use them again: what is here is only let go
            num_here = len(self._tiers.tiers_of(use.names))
            use = replace(use, names=use.names[:num_here], states=())
        if len(self._waiting) == MAX_TURNS:
            self._tiers.host.num_skipped += len(use.names)
            return
        self._go_on_with(_Copy(use, has_ended=True))

    def go_on(self) -> None:
        """Let go of what is copied, and hold the next blocks."""
        while self._batches and self._batches[0].work.done():
            self._end_batch(self._batches.popleft())
        for copy in [copy for copy in self._waiting if not copy.is_busy]:
            if len(self._batches) == MAX_BATCHES:
                return
            self._begin_batch(copy)

    def close(self) -> None:
        """Copy nothing more."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _begin_batch(self, copy: _Copy) -> None:
        """Hold and copy the next blocks of a turn. Where there are none, end it, or let it go on
        when it has ended."""
        names, host = copy.use.names, self._tiers.host
        while copy.num_done < len(names) and host.has(names[copy.num_done]):
            copy.num_done += 1
        if copy.num_done < len(names) and names[copy.num_done] in self._on_way:
            return  # another turn has the same beginning
        blocks, state = self._lend_next(copy)
        is_over = not blocks and state is None  # all is there, or gone
        if is_over and not copy.has_ended:
            self._waiting.remove(copy)
            return
        begun = (self._end, copy) if is_over else (self._copy, copy, names, blocks, state)
        work = self._executor.submit(*begun)
        work.add_done_callback(lambda ended: self._wake())
        copy.is_busy = True
        held = names[copy.num_done : copy.num_done + len(blocks)]
        self._on_way.update(held)
        self._batches.append(_Batch(copy, held, blocks, state, work))

    def _lend_next(self, copy: _Copy) -> tuple[list[int], LentState | None]:
        """The next blocks, or the next state once they are done."""
        use, host = copy.use, self._tiers.host
        if copy.num_done < len(use.names):
            most = min(self._num_spare(), MAX_HELD) if copy.has_ended else MAX_HELD
            return self._store.lend(use.names[copy.num_done : copy.num_done + most]), None
        for name in use.states[copy.num_states_done :]:
            copy.num_states_done += 1
            key = state_key(name)
            if not host.has(key) and (state := self._store.lend_state([key])) is not None:
                return [], state
        return [], None

    def _num_spare(self) -> int:
        """Blocks to hold at most for another turn that has ended; one at least."""
        held = sum(len(batch.blocks) for batch in self._batches if batch.copy.has_ended)
        return max((self._store.pool.num_free + held) // _FREE_SHARE - held, 1)

    def _end_batch(self, batch: _Batch) -> None:
        copy, pool = batch.copy, self._store.pool
        self._on_way.difference_update(batch.names)
        held = zip(batch.blocks, batch.names, strict=True)
        self._tiers.forget([name for block, name in held if pool.hash_of(block) != name])
        if batch.blocks:
            self._store.end_loan(batch.blocks, 0)
        if batch.state is not None:
            self._store.end_state_loan(batch.state, is_kept=False)
        copy.is_busy = False
        copy.num_done += len(batch.blocks)
        if batch.work.cancelled() or not batch.work.result():
            copy.is_left = True
            self._waiting.remove(copy)

    def _copy(
        self,
        copy: _Copy,
        names: Sequence[BlockHash],
        blocks: list[int],
        state: LentState | None,
    ) -> bool:
        """In the executor's thread; False where the turn has ended, as no more can be kept."""
        cache = self._store.cache
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
        use = copy.use
        if copy.turn is None:
            copy.turn = self._tiers.begin(use)
        elif copy.turn.use is not use:
            self._tiers.extend(copy.turn, use)
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
