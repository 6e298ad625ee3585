"""Moves decoding requests to other workers, with their KV blocks.

A drained worker keeps its stream until its requests have moved. A move has these stages:

    Prefetch to the target ─▶ it fetches the blocks while the source decodes ─▶ Prefetched
        ─▶ repeated if the source has generated many tokens since
        ─▶ once more for the block that the current step completes
        ─▶ Pause to the source, which ends its step ─▶ Paused ─▶ the request is sent to the target

A request that its worker would have to preempt moves in the same way, but without waiting for a
full block, if another worker has enough free KV blocks.

The target computes the few tokens after the last full block, so the pause of a stream does not
depend on its length. If both workers have no other request, the request pauses when the fetch of
its last block begins, and one token is left to compute. If they are busy, they reply only between
steps, so the request decodes until the block has been fetched. If a worker dies or the blocks do
not arrive, the request is replayed from its tokens. Source of the idea: Llumnix (OSDI 2024),
section 4.2, which copies the last blocks while the request is paused.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from gateway.engines.assignment_queue import AssignmentQueue
from gateway.engines.engine_client import EngineClient
from gateway.engines.request_router import RequestRouter
from gateway.engines.submission import Submission
from gateway.engines.worker_registry import WorkerRegistry
from workers.requests.wire import Pause, Paused, Prefetched

logger = logging.getLogger(__name__)

MAX_CONCURRENT_MOVES = 4
"""Maximum number of concurrent moves from one worker. Each move adds rows to a step of its target
worker, so that requests that arrive together delay each other."""
MAX_REMAINING_TOKENS = 32
"""Maximum number of tokens generated since a move's last ``Prefetch`` message at which the move
proceeds to its last KV block. With more tokens, the target first fetches the new blocks in another
round."""
MAX_ROUNDS = 4
"""Maximum number of ``Prefetch`` messages (rounds) of one move before its last KV block."""
_ANSWER_LIMIT_S = 5.0
"""Longest time in seconds for which a move waits for the target's reply ``Prefetched``."""
_BLOCK_LIMIT_S = 2.0
"""Longest time in seconds for which a move waits until the request's newest KV block is full."""
_PAUSE_LIMIT_S = 2.0
"""Longest time in seconds for which a move waits for the source's reply ``Paused``. After this time
the request moves without the reply."""
_RETRY_S = 0.2
"""Retry interval in seconds while no other worker can run a request of a drained worker."""


class _Stage(Enum):
    """Stage of a request's move to another worker: the event that the move waits for."""

    BLOCKS = "the fetch of the full blocks"
    FULL_BLOCK = "the token that completes a block, which the current step computes"
    LAST_BLOCK = "the fetch of that block"
    PAUSED = "the end of the source's last step with the request"


@dataclass(slots=True, eq=False)
class _Move:
    """A running move of one request from a source worker to a target worker."""

    entry: Submission
    source: EngineClient
    target: EngineClient
    lengths: tuple[int, ...] = ()
    """Output length of each choice in tokens when the last ``Prefetch`` message was sent."""
    num_rounds: int = 0
    stage: _Stage = _Stage.BLOCKS
    timer: asyncio.TimerHandle | None = None

    @property
    def num_new(self) -> int:
        """Number of tokens since the last ``Prefetch`` message, which the target must compute."""
        entry = self.entry
        return sum(len(entry.outputs[c]) - self.lengths[c] for c in entry.open_choices)


class RequestMover:
    """Moves decoding requests of a gateway between workers. All methods run on the event loop.

    Args:
        workers: the connected workers and the requests that each can run.
        router: chooses the target of a move.
        assignments: reassigns a request from its worker to the target.
    """

    def __init__(
        self, workers: WorkerRegistry, router: RequestRouter, assignments: AssignmentQueue
    ) -> None:
        self._workers = workers
        self._router = router
        self._assignments = assignments
        self._waiting: dict[EngineClient, deque[Submission]] = {}
        """For each drained worker, its requests that have not begun to move."""
        self._moves: dict[str, _Move] = {}
        """Running moves of requests by request id."""
        self.on_cancel: Callable[[Submission, EngineClient], None] = lambda entry, source: None
        """Callback for a request that stays at its source, as its move was cancelled."""
        self._retrying: set[EngineClient] = set()
        """Drained workers with requests that no other worker can run."""

    def begin(self, source: EngineClient) -> None:
        """Begin to move all requests of a drained worker."""
        entries = source.submissions
        waiting = (e for e in entries if e.request.request_id not in self._moves)
        self._waiting[source] = deque(waiting)
        self._start_next(source)

    def on_kv_pressure(self, entry: Submission, source: EngineClient) -> None:
        """Move a request away from ``source``, which runs out of KV blocks.

        No effect if the request cannot move, if ``source`` is drained or already moves a request,
        or if no other worker has enough free blocks.
        """
        if not _can_move(entry) or source in self._waiting or self._num_moving(source):
            return
        if (target := self._router.pick_with_free_kv(entry, source)) is not None:
            self._begin_move(entry, source, target)

    def end(self, worker: str) -> None:
        """End all moves from a worker that is no longer drained or was lost.

        Moves to this worker are cancelled, and begin again if their source is drained.
        """
        for source in [s for s in self._waiting if s.worker == worker]:
            del self._waiting[source]
        for move in [m for m in self._moves.values() if m.source.worker == worker]:
            self._cancel(move)
        for move in [m for m in self._moves.values() if m.target.worker == worker]:
            self._restart(move)

    def take(self, client: EngineClient, message: Prefetched | Paused) -> bool:
        """Advance a move after a message of ``client``: the target has fetched the blocks
        (``Prefetched``), or the source has paused the request after its last output (``Paused``).

        Returns whether the request of the message moves.
        """
        if (move := self._moves.get(message.request_id)) is None:
            return False
        if isinstance(message, Prefetched):
            self._note_prefetched(move, client, message)
        elif move.source is client and move.stage is _Stage.PAUSED:
            self._finish(move)
        elif move.source is client:  # it was to be handed over; the move needs more blocks first
            client.stream.send(Pause(request_id=message.request_id, is_cancelled=True))
        return True

    def _note_prefetched(self, move: _Move, target: EngineClient, message: Prefetched) -> None:
        fetches = (_Stage.BLOCKS, _Stage.LAST_BLOCK)
        if move.target is not target or move.stage not in fetches:
            return
        if message.attempt != move.entry.attempt or self._is_over(move):
            return
        if move.stage is _Stage.LAST_BLOCK:
            self._pause(move)
        elif move.num_new > MAX_REMAINING_TOKENS and move.num_rounds < MAX_ROUNDS:
            self._prefetch(move)
        elif self._must_leave(move) and _block_size(target):
            move.stage = _Stage.FULL_BLOCK
            self._set_timer(move, _BLOCK_LIMIT_S, self._pause)
            self._look_for_block(move)
        else:
            self._pause(move)

    def note_token(self, entry: Submission) -> None:
        """Schedule a check of whether the new token of a moving request completes its block."""
        move = self._moves.get(entry.request.request_id)
        if move is not None and move.stage is _Stage.FULL_BLOCK:
            asyncio.get_running_loop().call_soon(self._look_for_block, move)

    def drop(self, entry: Submission) -> None:
        """Forget the move of a request that has ended or left its worker."""
        if (move := self._moves.get(entry.request.request_id)) is not None:
            self._forget(move)
            self._start_next(move.source)

    def _start_next(self, source: EngineClient) -> None:
        """Begin moves of a drained worker's waiting requests, up to ``MAX_CONCURRENT_MOVES``."""
        waiting = self._waiting.get(source)
        staying: list[Submission] = []
        while waiting and self._num_moving(source) < MAX_CONCURRENT_MOVES:
            entry = waiting.popleft()
            if entry.stream is not source:
                continue  # the request has ended
            if not self._workers.can_any_run(entry):
                staying.append(entry)
                continue
            if not _can_move(entry):
                self._assignments.move(entry, None, 0)
                continue
            target = self._router.pick(entry, self._workers.ready, source.group)
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
        move.target.prefetch(move.entry, move.source)
        self._set_timer(move, _ANSWER_LIMIT_S, self._finish)

    def _look_for_block(self, move: _Move) -> None:
        """Begin the fetch of a move's last block if the newest token completes the block."""
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

    def _cancel(self, move: _Move) -> None:
        """Cancel a move; the source continues with the request."""
        self._forget(move)
        if move.stage is _Stage.PAUSED:
            name = move.entry.request.request_id
            move.source.stream.send(Pause(request_id=name, is_cancelled=True))
        if move.entry.stream is move.source and not self._must_leave(move):
            self.on_cancel(move.entry, move.source)

    def _restart(self, move: _Move) -> None:
        """Cancel a move; begin another move of its request if the source is drained."""
        self._cancel(move)
        waiting = self._waiting.get(move.source)
        if waiting is not None:
            waiting.append(move.entry)
            self._start_next(move.source)

    def _finish(self, move: _Move) -> None:
        """End a move: send the request to the target.

        If the target may lack the request's blocks, any worker gets the request if the source is
        drained; otherwise the request stays at the source.
        """
        if self._is_over(move):
            return
        are_there = move.stage is not _Stage.BLOCKS and move.target.hello is not None
        target = move.target if are_there else None
        if target is None and not self._must_leave(move):
            self._cancel(move)
            return
        self._forget(move)
        self._assignments.move(move.entry, target, move.num_new)
        self._start_next(move.source)

    def _must_leave(self, move: _Move) -> bool:
        """Whether the source is drained. If not, the request stays there when its move fails."""
        return move.source in self._waiting

    def _is_over(self, move: _Move) -> bool:
        """Whether the move was cancelled, or the request has ended or left its source worker."""
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
    """Whether a request can move with its KV blocks: it has output, and no prompt embeddings."""
    return any(entry.outputs) and entry.request.prompt_embeds is None


def _are_idle(move: _Move) -> bool:
    """Whether the two workers of a move have no request of this gateway except the moving one."""
    return len(move.source.submissions) + len(move.target.submissions) == 1


def _length(entry: Submission) -> int:
    """Number of tokens of a request's prompt and of its shortest unfinished choice."""
    shortest = min((len(entry.outputs[c]) for c in entry.open_choices), default=0)
    return len(entry.request.prompt) + shortest


def _block_size(client: EngineClient) -> int:
    """Number of tokens per KV block; 0 without a prefix cache, or before the handshake."""
    return client.hello.kv_block_size if client.hello is not None else 0
