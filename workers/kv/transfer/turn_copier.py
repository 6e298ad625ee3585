"""Copies the blocks of turns from the pool into the tiers, without blocking a step.

When a prompt is computed, and when its turn ends, the engine thread only notes the names of the
blocks. Between steps it holds some of the blocks that the tiers lack, and a copier thread copies
them. Blocks of the prompt are copied while the sequence runs, as they cannot be evicted then;
blocks of the output after its end. Blocks evicted before the copy starts are skipped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.kv.tiers.index import TierTurn
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.store import KvTransferStore, ProvidedState
from workers.kv.turns import TurnUse
from workers.requests.block_hash import BlockHash, state_key
from workers.requests.sequence import SequenceState

logger = logging.getLogger(__name__)

MAX_HELD = 64
"""Limit of blocks of a turn that are held and copied at a time."""
MAX_BATCHES = 8
"""Limit of batches of held blocks. It is above 1 as blocks can be held only between two steps."""
_FREE_SHARE = 8
"""Copies of ended turns hold at most one in ``_FREE_SHARE`` free blocks."""
_RUNNING_SHARE = 0.5
"""Largest fraction of host memory that running turns hold."""
MAX_TURNS = 1024
"""Limit of waiting turns; later turns are skipped."""


@dataclass(slots=True, eq=False)
class _Copy:
    """A turn to copy, and its progress."""

    use: TurnUse
    """Blocks to copy: only the prompt's while the sequence runs, then all."""
    has_ended: bool
    """Whether the sequence no longer runs."""
    is_busy: bool = False
    """Whether a batch of its blocks is being copied."""
    is_finished: bool = False
    """Whether copying has ended: all is copied, a tier is full, or an error occurred."""
    turn: TierTurn | None = None
    """The turn in the tiers, only for the copier thread; None before the first batch."""
    num_done: int = 0
    """Number of blocks, from the first on, that are in the tiers."""
    num_states_done: int = 0
    """Number of states, from the first on, that are in the tiers or cannot be copied."""


@dataclass(slots=True, eq=False)
class _Batch:
    """Held blocks, or a held state, that are being copied; the last batch of a turn is empty."""

    copy: _Copy
    names: Sequence[BlockHash]
    """Names of the blocks."""
    blocks: list[int]
    state: ProvidedState | None
    work: Future[bool]
    """Work of the copier thread; its result is whether more of the turn can be stored."""


class TurnCopier:
    """Copies turns to the tiers on its own thread. Call all methods on the engine thread.

    Args:
        store: holds blocks of the pool, and states.
        tiers: destination of the copies.
        wake: called by the copier thread when ``advance`` should be called.
    """

    def __init__(self, store: KvTransferStore, tiers: KvTiers, wake: Callable[[], None]) -> None:
        self._store = store
        self._tiers = tiers
        self._wake = wake
        self._waiting: deque[_Copy] = deque()
        self._running: dict[SequenceState, _Copy] = {}
        """Copies of running sequences, whether or not in ``_waiting``."""
        self._batches: deque[_Batch] = deque()
        """Batches that are being copied, oldest first."""
        self._copying: set[BlockHash] = set()
        """Blocks in ``_batches``."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-copier")
        self._executor.submit(int)  # start the thread: a step could not handle an error

    @property
    def is_idle(self) -> bool:
        """Whether no turn is being copied or waits."""
        return not self._batches and not self._waiting

    def prompt_done(self, sequence: SequenceState, use: TurnUse) -> None:
        """Queue the blocks of a computed prompt to be copied; see ``TurnListener``."""
        if use.hints.keep_s != 0 and len(self._waiting) < MAX_TURNS and self._may_hold(use):
            self._running[sequence] = copy = _Copy(use, has_ended=False)
            self._schedule(copy)

    def ended(self, sequence: SequenceState, use: TurnUse) -> None:
        """Queue the blocks of an ended turn to be copied; see ``TurnListener``."""
        copy = self._running.pop(sequence, None)
        if copy is None:
            self._queue_ended(use)
            return
        copy.use, copy.has_ended = use, True
        self._schedule(copy)

    def stopped(self, sequence: SequenceState) -> None:
        """See ``TurnListener``. Copied blocks of the prompt stay in the tiers."""
        if (copy := self._running.pop(sequence, None)) is not None:
            copy.has_ended = True
            self._schedule(copy)

    def _may_hold(self, use: TurnUse) -> bool:
        """Whether a running turn fits into host memory, where its blocks are not evictable."""
        num_blocks = sum(len(copy.use.names) for copy in self._running.values()) + len(use.names)
        num_bytes = num_blocks * self._store.cache.block_bytes
        return num_bytes <= self._tiers.host.capacity_bytes * _RUNNING_SHARE

    def _schedule(self, copy: _Copy) -> None:
        if not copy.is_finished and copy not in self._waiting:
            self._waiting.append(copy)
        self._wake()

    def _queue_ended(self, use: TurnUse) -> None:
        """Queue an ended turn whose blocks were not copied while its sequence ran."""
        if use.hints.keep_s == 0:  # not needed again: only make copies in the tiers evictable
            num_here = len(self._tiers.tiers_of(use.names))
            use = replace(use, names=use.names[:num_here], states=())
        if len(self._waiting) == MAX_TURNS:
            self._tiers.host.skip(use)
            return
        self._schedule(_Copy(use, has_ended=True))

    def advance(self) -> None:
        """Release copied blocks and hold the next ones."""
        while self._batches and self._batches[0].work.done():
            self._end_batch(self._batches.popleft())
        for copy in [copy for copy in self._waiting if not copy.is_busy]:
            if len(self._batches) == MAX_BATCHES:
                return
            self._begin_batch(copy)

    def close(self) -> None:
        """Cancel waiting copies and stop the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _begin_batch(self, copy: _Copy) -> None:
        """Hold and copy the next blocks of a turn.

        If nothing is left to copy, end the turn, or wait while its sequence still runs.
        """
        names, host = copy.use.names, self._tiers.host
        while copy.num_done < len(names) and host.has(names[copy.num_done]):
            copy.num_done += 1
        if copy.num_done < len(names) and names[copy.num_done] in self._copying:
            return  # another turn has the same beginning
        blocks, state = self._acquire_next(copy)
        is_over = not blocks and state is None  # all are copied or evicted
        if is_over and not copy.has_ended:
            self._waiting.remove(copy)
            return
        begun = (self._end, copy) if is_over else (self._copy, copy, names, blocks, state)
        work = self._executor.submit(*begun)
        work.add_done_callback(lambda ended: self._wake())
        copy.is_busy = True
        held = names[copy.num_done : copy.num_done + len(blocks)]
        self._copying.update(held)
        self._batches.append(_Batch(copy, held, blocks, state, work))

    def _acquire_next(self, copy: _Copy) -> tuple[list[int], ProvidedState | None]:
        """Hold the next blocks or, if all blocks are copied, the next state."""
        use, host = copy.use, self._tiers.host
        if copy.num_done < len(use.names):
            most = min(self._num_spare(), MAX_HELD) if copy.has_ended else MAX_HELD
            return self._store.acquire(use.names[copy.num_done : copy.num_done + most]), None
        for name in use.states[copy.num_states_done :]:
            copy.num_states_done += 1
            key = state_key(name)
            if not host.has(key) and (state := self._store.acquire_state([key])) is not None:
                return [], state
        return [], None

    def _num_spare(self) -> int:
        """Return how many blocks may be held for another ended turn, at least one."""
        held = sum(len(batch.blocks) for batch in self._batches if batch.copy.has_ended)
        return max((self._store.pool.num_free + held) // _FREE_SHARE - held, 1)

    def _end_batch(self, batch: _Batch) -> None:
        copy, pool = batch.copy, self._store.pool
        self._copying.difference_update(batch.names)
        held = zip(batch.blocks, batch.names, strict=True)
        self._tiers.forget([name for block, name in held if pool.hash_of(block) != name])
        if batch.blocks:
            self._store.release(batch.blocks, 0)
        if batch.state is not None:
            self._store.release_state(batch.state, is_kept=False)
        copy.is_busy = False
        copy.num_done += len(batch.blocks)
        if batch.work.cancelled() or not batch.work.result():
            copy.is_finished = True
            self._waiting.remove(copy)

    def _copy(
        self,
        copy: _Copy,
        names: Sequence[BlockHash],
        blocks: list[int],
        state: ProvidedState | None,
    ) -> bool:
        """Copy a batch, on the copier thread. False if the rest of the turn cannot be stored."""
        cache = self._store.cache
        try:
            turn = self._tier_turn(copy)
            for place, block in enumerate(blocks, copy.num_done):
                parent = names[place - 1] if place else None
                if not self._put(turn, names[place], parent, cache.read_block(block)):
                    return self._end(copy)
            if state is not None:
                name = copy.use.states[copy.num_states_done - 1]
                if not self._put(turn, state_key(name), name, cache.read_state(state.slot)):
                    return self._end(copy)
        except Exception:  # out of memory, for example: the worker continues to serve
            logger.exception("could not copy KV blocks to the tiers")
            return self._end(copy)
        return True

    def _tier_turn(self, copy: _Copy) -> TierTurn:
        use = copy.use
        if copy.turn is None:
            copy.turn = self._tiers.begin(use)
        elif copy.turn.use is not use:
            self._tiers.extend(copy.turn, use)
        return copy.turn

    def _end(self, copy: _Copy) -> bool:
        """End a turn, on the copier thread. Blocks that are not in the tiers now are skipped."""
        try:
            self._tiers.end(self._tier_turn(copy))
        except Exception:  # as above
            logger.exception("the copy of a turn to the tiers could not be finished")
        return False

    def _put(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        return self._tiers.put(turn, name, parent, as_bytes(data))


def as_bytes(data: Tensor) -> Tensor:
    """View a contiguous tensor as bytes (uint8), the data type of the tiers."""
    return data.view(torch.uint8).flatten()
