"""Requests that move to another worker while they decode, with their KV blocks.

A worker that is drained keeps its stream until its requests have left:

    Prefetch to another worker ─▶ it fetches the blocks, the first worker decodes on ─▶ Prefetched
        ─▶ again, if many tokens came meanwhile
        ─▶ once more for the block that the step in progress completes
        ─▶ Pause to the first worker, which ends its step ─▶ Paused ─▶ the request goes over

So does a request that its worker would have to preempt, where another worker has room.

The other worker computes the few tokens behind that block: the pause of a stream does not grow with
its length. Where the two workers have nothing else to do, the pause begins with the block, which
comes at once: a single token is left then. Where they have, they answer only between steps, and the
request decodes on until the block is there. A request of a worker that runs out of blocks waits for
no full one. When either worker dies, or blocks do not come, the request continues as always, from
its tokens. Source of the idea: Llumnix (OSDI 2024), section 4.2, which copies the last blocks while
nobody decodes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from msgspec.structs import replace

from gateway.engines.assignment_queue import AssignmentQueue
from gateway.engines.engine_client import EngineClient
from gateway.engines.request_router import RequestRouter
from gateway.engines.submission import Submission
from gateway.engines.worker_registry import WorkerRegistry
from workers.requests.wire import Pause, Paused, Prefetch, Prefetched

logger = logging.getLogger(__name__)

MAX_MOVING = 4
"""Requests of one worker that are on their way at the same time: each adds rows to a step of the
other worker, and requests that go over together delay each other."""
MAX_LEFT_TOKENS = 32
"""Tokens since the last ``Prefetch`` up to which a move goes on to its last block."""
MAX_ROUNDS = 4
"""Prefetches of one move, however many tokens come meanwhile."""
_ANSWER_LIMIT_S = 5.0
"""Longest wait for ``Prefetched``."""
_BLOCK_LIMIT_S = 2.0
"""Longest wait for a full block."""
_PAUSE_LIMIT_S = 2.0
"""Longest wait for ``Paused``, for a step or two; then the request goes over all the same."""
_RETRY_S = 0.2
"""Pause while no other worker can run a request."""


class _Stage(Enum):
    """What a move waits for."""

    BLOCKS = "the blocks that were full when it began, and those that came meanwhile"
    FULL_BLOCK = "the last token of a block, whose keys and values the step in progress computes"
    LAST_BLOCK = "that block"
    PAUSED = "the end of its worker's last step with it; then the request goes over"


@dataclass(slots=True, eq=False)
class _Move:
    """One request on its way."""

    entry: Submission
    source: EngineClient
    target: EngineClient
    lengths: tuple[int, ...] = ()
    """Of the output of each choice at the last ``Prefetch``."""
    num_rounds: int = 0
    stage: _Stage = _Stage.BLOCKS
    timer: asyncio.TimerHandle | None = None

    @property
    def num_new(self) -> int:
        """Tokens since the last ``Prefetch`` that another worker must compute."""
        entry = self.entry
        return sum(len(entry.outputs[c]) - self.lengths[c] for c in entry.open_choices)


class Moves:
    """All moves of a gateway. Event loop only.

    Args:
        workers: tells which workers can run a request.
        router: chooses the worker that a request moves to.
        assignments: takes a request from its worker, and gives it to another one.
    """

    def __init__(
        self, workers: WorkerRegistry, router: RequestRouter, assignments: AssignmentQueue
    ) -> None:
        self._workers = workers
        self._router = router
        self._assignments = assignments
        self._waiting: dict[EngineClient, deque[Submission]] = {}
        """By worker that is drained, its requests that have not begun to move."""
        self._moves: dict[str, _Move] = {}
        """By request id."""
        self._retrying: set[EngineClient] = set()
        """Workers that are drained and have requests that no other worker can run."""

    def begin(self, source: EngineClient) -> None:
        """Move all requests of a worker."""
        entries = source.submissions
        waiting = (e for e in entries if e.request.request_id not in self._moves)
        self._waiting[source] = deque(waiting)
        self._start_next(source)

    def relieve(self, entry: Submission, source: EngineClient) -> None:
        """Move a request of a worker that runs out of blocks; one at a time."""
        if not _can_move(entry) or source in self._waiting or self._num_moving(source):
            return
        if (target := self._router.pick_with_free_kv(entry, source)) is not None:
            self._begin_move(entry, source, target)

    def end(self, worker: str) -> None:
        """A worker is not drained any more, or its stream has ended."""
        for source in [s for s in self._waiting if s.worker == worker]:
            del self._waiting[source]
        for move in [m for m in self._moves.values() if m.source.worker == worker]:
            self._stay(move)
        for move in [m for m in self._moves.values() if m.target.worker == worker]:
            self._begin_again(move)

    def take(self, client: EngineClient, message: Prefetched | Paused) -> None:
        """A worker has fetched what it could, or computes no more of a request, whose outputs have
        all been delivered.
        """
        move = self._moves.get(message.request_id)
        if isinstance(message, Prefetched):
            self._note_prefetched(move, client, message)
        elif move is not None and move.source is client and move.stage is _Stage.PAUSED:
            self._finish(move)

    def _note_prefetched(
        self, move: _Move | None, target: EngineClient, message: Prefetched
    ) -> None:
        fetches = (_Stage.BLOCKS, _Stage.LAST_BLOCK)
        if move is None or move.target is not target or move.stage not in fetches:
            return
        if message.attempt != move.entry.attempt or self._is_over(move):
            return
        if move.stage is _Stage.LAST_BLOCK:
            self._pause(move)
        elif move.num_new > MAX_LEFT_TOKENS and move.num_rounds < MAX_ROUNDS:
            self._prefetch(move)
        elif self._must_leave(move) and _block_size(target):
            move.stage = _Stage.FULL_BLOCK
            self._set_timer(move, _BLOCK_LIMIT_S, self._pause)
            self._look_for_block(move)
        else:
            self._pause(move)

    def note_token(self, entry: Submission) -> None:
        """A worker has sent a token of a request, which is about to be delivered."""
        move = self._moves.get(entry.request.request_id)
        if move is not None and move.stage is _Stage.FULL_BLOCK:
            asyncio.get_running_loop().call_soon(self._look_for_block, move)

    def drop(self, entry: Submission) -> None:
        """A request has ended, or left its worker."""
        if (move := self._moves.get(entry.request.request_id)) is not None:
            self._forget(move)
            self._start_next(move.source)

    def _start_next(self, source: EngineClient) -> None:
        """Begin moves of a worker's requests, as many as may be on their way."""
        waiting = self._waiting.get(source)
        staying: list[Submission] = []
        while waiting and self._num_moving(source) < MAX_MOVING:
            entry = waiting.popleft()
            if entry.stream is not source:
                continue  # it has ended meanwhile
            if not self._workers.can_any_run(entry):
                staying.append(entry)
                continue
            if not _can_move(entry):
                self._assignments.move(entry, None, 0)
                continue
            target = self._router.pick(entry, self._workers.ready)
            assert target is not None, "there is another worker"
            self._begin_move(entry, source, target)
        if waiting is not None and staying:
            waiting.extend(staying)
            if source not in self._retrying:
                self._retrying.add(source)
                asyncio.get_running_loop().call_later(_RETRY_S, self._retry, source)

    def _begin_move(self, entry: Submission, source: EngineClient, target: EngineClient) -> None:
        move = self._moves[entry.request.request_id] = _Move(entry, source, target)
        self._prefetch(move)

    def _retry(self, source: EngineClient) -> None:
        self._retrying.discard(source)
        self._start_next(source)

    def _prefetch(self, move: _Move) -> None:
        move.num_rounds += 1
        move.lengths = tuple(map(len, move.entry.outputs))
        message = move.entry.message(time.monotonic())
        request = replace(message, kv_peer=move.source.worker)
        move.target.stream.send(Prefetch(request=request))
        self._set_timer(move, _ANSWER_LIMIT_S, self._finish)

    def _look_for_block(self, move: _Move) -> None:
        """Let the request go over if its newest token completes a block."""
        if move.stage is _Stage.FULL_BLOCK and not self._is_over(move):
            size, length = _block_size(move.target), _length(move.entry)
            if size and length % size == 0:
                move.stage = _Stage.LAST_BLOCK
                self._prefetch(move)
                if _are_idle(move):
                    self._pause(move, length + 1)

    def _pause(self, move: _Move, num_tokens: int = 0) -> None:
        if not self._is_over(move):
            move.stage = _Stage.PAUSED
            name = move.entry.request.request_id
            move.source.stream.send(Pause(request_id=name, num_tokens=num_tokens))
            self._set_timer(move, _PAUSE_LIMIT_S, self._finish)

    def _stay(self, move: _Move) -> None:
        """Give a move up; its worker goes on with the request."""
        self._forget(move)
        if move.stage is _Stage.PAUSED:
            name = move.entry.request.request_id
            move.source.stream.send(Pause(request_id=name, is_over=True))

    def _begin_again(self, move: _Move) -> None:
        """Its other worker is gone; where it may stay, it does."""
        self._stay(move)
        waiting = self._waiting.get(move.source)
        if waiting is not None:
            waiting.append(move.entry)
            self._start_next(move.source)

    def _finish(self, move: _Move) -> None:
        """The request goes over; to any worker if its blocks are not known to be at this one."""
        if self._is_over(move):
            return
        are_there = move.stage is not _Stage.BLOCKS and move.target.hello is not None
        target = move.target if are_there else None
        if target is None and not self._must_leave(move):
            self._stay(move)
            return
        self._forget(move)
        self._assignments.move(move.entry, target, move.num_new)
        self._start_next(move.source)

    def _must_leave(self, move: _Move) -> bool:
        """Its worker is drained; else it stays where the move fails."""
        return move.source in self._waiting

    def _is_over(self, move: _Move) -> bool:
        """It was given up, or the request has ended meanwhile, or its worker was lost."""
        if self._moves.get(move.entry.request.request_id) is not move:
            return True
        is_over = move.entry.stream is not move.source
        if is_over:
            self.drop(move.entry)
        return is_over

    def _num_moving(self, source: EngineClient) -> int:
        return sum(move.source is source for move in self._moves.values())

    def _set_timer(self, move: _Move, delay_s: float, call: Callable[[_Move], None]) -> None:
        if move.timer is not None:
            move.timer.cancel()
        move.timer = asyncio.get_running_loop().call_later(delay_s, call, move)

    def _forget(self, move: _Move) -> None:
        if move.timer is not None:
            move.timer.cancel()
        self._moves.pop(move.entry.request.request_id, None)


def _can_move(entry: Submission) -> bool:
    """Whether blocks go with it: something was computed, and not too much must be sent again."""
    return any(entry.outputs) and entry.request.prompt_embeds is None


def _are_idle(move: _Move) -> bool:
    """Neither worker has another request of this gateway: they begin no step meanwhile."""
    return len(move.source.submissions) + len(move.target.submissions) == 1


def _length(entry: Submission) -> int:
    """Tokens of its shortest choice that goes on, with the prompt."""
    shortest = min((len(entry.outputs[c]) for c in entry.open_choices), default=0)
    return len(entry.request.prompt) + shortest


def _block_size(client: EngineClient) -> int:
    """Tokens of a KV block; 0 without a prefix cache, or before the hello."""
    return client.hello.kv_block_size if client.hello is not None else 0
