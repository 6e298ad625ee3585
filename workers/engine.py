"""The engine of one attention worker: schedule, run, sample, commit, emit.

Nothing of a step counts before the model ran to its last layer and its tokens are drawn: a peer
lost in the middle leaves every sequence as it was, and the step can be run again with the same
result. The engine belongs to one thread; only the read-only numbers may be read from others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.config import EngineSection
from cluster.errors import ContextLengthError, QueueFullError, RequestError
from workers.dist.dispatcher import TokenDispatcher
from workers.dist.header import StepHeader
from workers.families.base import BankSpec, ModelConfig
from workers.kv_blocks import BlockPool
from workers.kv_cache import KVCache, num_kv_blocks
from workers.layers import AttentionModel, Recorder
from workers.model_runner import ModelRunner, StepResult
from workers.request import FinishReason, Request, Timings, TokenLogprob, TokenOutput
from workers.sampling import (
    Drawn,
    SamplingRow,
    TokenCounts,
    logprob_entries,
    needs_counts,
    sample,
)
from workers.scheduler import Ending, Plan, PlannedRows, RowsWanted, Scheduler
from workers.scheduler import Sequence as Choice

_SCORED_ROWS = 64
"""Prompt rows whose logits are made at a time: 64 x 50304 float32 are 13 MB."""


@dataclass(slots=True, eq=False)
class _Track:
    """What the engine keeps of one choice beside the scheduler's state."""

    choice: Choice
    """The scheduler's sequence."""
    received: float
    """Monotonic seconds."""
    first_dispatch: float | None = None
    """Monotonic seconds of the first dispatch of one of its rows."""
    first_token: float | None = None
    """Monotonic seconds of the commit of its first new token."""
    counts: TokenCounts | None = None
    """Kept where penalties are used."""
    wants_prompt_logprobs: bool = False
    """Choice 0 of a request that asks for them and has none delivered."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """Entries so far, the first prompt token's is None."""


@dataclass(frozen=True, slots=True)
class _StepTokens:
    """What was drawn and scored in a step, before the commit."""

    drawing: tuple[PlannedRows, ...]
    """Planned rows whose last row is a sequence's newest token."""
    drawn: dict[Choice, Drawn]
    """By sequence that drew a token, or tried to."""
    scored: dict[Choice, list[TokenLogprob]]
    """New prompt logprobs."""
    failed: frozenset[Choice]
    """Sequences with NaN or infinity."""


class Engine:
    """Requests in, tokens out, one step at a time."""

    def __init__(
        self,
        *,
        model: AttentionModel,
        config: ModelConfig,
        banks: Sequence[BankSpec],
        dispatcher: TokenDispatcher,
        section: EngineSection,
        max_model_len: int | None = None,
        rank: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Allocates the KV cache on the model's device. Raises ``ConfigError``.

        ``max_model_len`` None takes the checkpoint's context.
        """
        self._config = config
        self._section = section
        self._rank = rank
        self._clock = clock
        self.max_model_len = max_model_len or config.max_position_embeddings
        """Context limit in tokens."""
        num_blocks = num_kv_blocks(config, section, self.max_model_len, model.dtype)
        self._cache = KVCache(
            config=config,
            num_blocks=num_blocks,
            block_size=section.block_size_tokens,
            dtype=model.dtype,
            device=model.device,
        )
        self._pool = BlockPool(num_blocks)
        self._scheduler = Scheduler(
            self._pool,
            block_size=section.block_size_tokens,
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=section.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            eos_token_ids=config.eos_token_ids,
        )
        self._runner = ModelRunner(
            model=model, cache=self._cache, banks=banks, dispatcher=dispatcher, rank=rank
        )
        self._banks = tuple(banks)
        self._tracks: dict[str, list[_Track]] = {}
        self._pending: list[TokenOutput] = []
        self._num_received = 0
        self._counters = dict.fromkeys(
            ("steps_total", "prompt_tokens_total", "generation_tokens_total"), 0
        )
        self._finished = dict.fromkeys(FinishReason, 0)
        self._load = [torch.zeros(b.num_experts, dtype=torch.int64) for b in banks]

    # Requests

    def add_request(self, request: Request, received: float | None = None) -> None:
        """Queue a request that came in at ``received`` (this engine's clock; None is now).

        Raises ``RequestError`` for what can never run and ``QueueFullError`` for too much at once;
        then nothing was changed. A newer attempt at a known request replaces the older one.
        """
        self._check(request)
        self.abort(request.request_id)
        now = self._clock() if received is None else received
        deadline = now + request.deadline_ms / 1000 if request.deadline_ms else math.inf
        tracks: list[_Track] = []
        for index in range(request.n):
            choice = Choice(
                request=request,
                choice=index,
                arrival=self._num_received,
                deadline=deadline,
                output=list(_output_so_far(request, index)),
                leader=tracks[0].choice if tracks else None,
            )
            tracks.append(self._track(choice, now))
        self._num_received += 1
        self._counters["prompt_tokens_total"] += len(request.prompt)
        self._tracks[request.request_id] = tracks
        for track in tracks:
            ending = self._scheduler.ending(track.choice) if track.choice.output else None
            self._scheduler.add(track.choice)
            if ending is not None:
                self._end_early(track, ending, now)

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """End a request, or some of its choices, without any output; frees blocks at once."""
        for track in tuple(self._tracks.get(request_id, ())):
            if not choices or track.choice.choice in choices:
                self._scheduler.remove(track.choice)
                self._forget(track, FinishReason.ABORT)

    def has_request(self, request_id: str) -> bool:
        """Whether a choice of it waits or runs."""
        return request_id in self._tracks

    @property
    def has_work(self) -> bool:
        """Whether there are requests, or outputs that ``poll`` would return."""
        return bool(self._tracks or self._pending)

    # Steps

    def wanted(self) -> RowsWanted:
        """Rows that the next step could run here."""
        return self._scheduler.wanted()

    def poll(self) -> list[TokenOutput]:
        """Outputs that need no step: choices whose time is up, or that were complete already."""
        self._expire(self._clock())
        outputs, self._pending = self._pending, []
        return outputs

    @torch.inference_mode()
    def step(self, header: StepHeader) -> list[TokenOutput]:
        """Run what the header grants this rank, and return the news, those of ``poll`` included.

        Takes part in the exchanges of a grant also when there is nothing left to run. Raises
        ``TransportError`` with the plan abandoned and all sequences as they were.
        """
        self._expire(self._clock())
        grant = header.grant(self._rank)
        plan = self._scheduler.schedule(grant.decode_rows, grant.prefill_rows)
        try:
            result = self._runner.run(header, plan)
            tokens = None if result is None else self._draw(plan, result)
        except BaseException:
            self._scheduler.abandon(plan)
            raise
        finally:
            self._note_first_dispatch(plan)
        if result is not None and tokens is not None:
            self._commit(plan, result, tokens)
        return self.poll()

    def _draw(self, plan: Plan, result: StepResult) -> _StepTokens:
        """Sample and score; changes nothing."""
        failed = {
            planned.sequence
            for planned, is_finite in zip(plan.rows, result.finite, strict=True)
            if not is_finite
        }
        drawing: list[PlannedRows] = []
        rows: list[int] = []
        sampled: list[Choice] = []
        for planned, first_row in zip(plan.rows, result.first_row, strict=True):
            if planned.sequence in failed or not planned.draws_token:
                continue
            drawing.append(planned)
            if planned.sequence.params.max_tokens:
                sampled.append(planned.sequence)
                rows.append(first_row + planned.count - 1)
        drawn: dict[Choice, Drawn] = {}
        if rows:
            logits = self._runner.logits(result.hidden[rows])
            tokens = sample(logits, [self._sampling_row(s) for s in sampled])
            drawn = dict(zip(sampled, tokens, strict=True))
            failed |= {s for s, d in drawn.items() if not d.is_finite}
        scored = {
            planned.sequence: self._score(planned, first_row, result)
            for planned, first_row in zip(plan.rows, result.first_row, strict=True)
            if self._find(planned.sequence).wants_prompt_logprobs
        }
        return _StepTokens(tuple(drawing), drawn, scored, frozenset(failed))

    def _sampling_row(self, choice: Choice) -> SamplingRow:
        params = choice.params
        ending: tuple[int, ...] = ()
        if len(choice.output) < params.min_tokens:
            eos = () if params.ignore_eos else self._config.eos_token_ids
            ending = (*eos, *params.stop_token_ids)
        counts = self._find(choice).counts
        return SamplingRow(params, choice.choice, len(choice.output), counts, ending)

    def _score(
        self, planned: PlannedRows, first_row: int, result: StepResult
    ) -> list[TokenLogprob]:
        """Logprobs of the prompt tokens behind these rows that have none yet."""
        prompt = planned.sequence.request.prompt
        known = len(self._find(planned.sequence).prompt_logprobs)
        first = max(planned.first, known - 1)
        last = min(planned.first + planned.count, len(prompt) - 1)
        entries: list[TokenLogprob] = []
        for start in range(first, last, _SCORED_ROWS):
            stop = min(start + _SCORED_ROWS, last)
            offset = first_row - planned.first
            logits = self._runner.logits(result.hidden[start + offset : stop + offset])
            num_top = planned.sequence.params.prompt_logprobs or 0
            tokens = prompt[start + 1 : stop + 1]
            entries += logprob_entries(logits, tokens, [num_top] * len(tokens))
        return entries

    def _commit(self, plan: Plan, result: StepResult, tokens: _StepTokens) -> None:
        """Make the step count, and queue its outputs."""
        now = self._clock()
        dirty = [block for choice in tokens.failed for block in choice.blocks]
        new = {s: d.token for s, d in tokens.drawn.items() if d.is_finite}
        endings = self._scheduler.commit(plan, new, tokens.failed)
        self._clear(dirty)
        self._count_load(result)
        self._counters["steps_total"] += 1
        self._counters["generation_tokens_total"] += len(new)
        for choice, entries in tokens.scored.items():
            self._find(choice).prompt_logprobs += entries
        for planned in tokens.drawing:
            choice = planned.sequence
            if choice not in tokens.failed:
                self._emit(choice, tokens.drawn.get(choice), endings.get(choice), now)
        for choice in tokens.failed:
            message = "the model's output was not finite (NaN or infinity)"
            self._emit_error(self._find(choice), message, "internal_error", now)

    # Outputs

    def _emit(self, choice: Choice, drawn: Drawn | None, ending: Ending | None, now: float) -> None:
        """Queue the news of a choice that drew a token, or was only scored."""
        track = self._find(choice)
        is_first = track.first_token is None
        if is_first:
            track.first_token = now
        if drawn is not None and track.counts is not None:
            track.counts.add(drawn.token)
        has_scores = is_first and track.wants_prompt_logprobs
        self._pending.append(
            TokenOutput(
                request_id=choice.request.request_id,
                attempt=choice.request.attempt,
                choice=choice.choice,
                index=len(choice.output) - (drawn is not None),
                token_ids=() if drawn is None else (drawn.token,),
                logprobs=() if drawn is None or drawn.logprob is None else (drawn.logprob,),
                prompt_logprobs=tuple(track.prompt_logprobs) if has_scores else None,
                finish_reason=ending.reason if ending else None,
                stop_token_id=ending.stop_token_id if ending else None,
                timings=_timings(track, now) if ending else None,
            )
        )
        if ending is not None:
            self._forget(track, ending.reason)

    def _end_early(self, track: _Track, ending: Ending, now: float) -> None:
        """A choice that an earlier attempt had completed: only the end is news."""
        self._scheduler.remove(track.choice)
        self._emit(track.choice, None, ending, now)

    def _emit_error(self, track: _Track, message: str, code: str, now: float) -> None:
        choice = track.choice
        self._pending.append(
            TokenOutput(
                request_id=choice.request.request_id,
                attempt=choice.request.attempt,
                choice=choice.choice,
                index=len(choice.output),
                finish_reason=FinishReason.ERROR,
                error=message,
                error_code=code,
                timings=_timings(track, now),
            )
        )
        self._forget(track, FinishReason.ERROR)

    def _expire(self, now: float) -> None:
        late = [t for tracks in self._tracks.values() for t in tracks if now >= t.choice.deadline]
        for track in late:
            self._scheduler.remove(track.choice)
            limit = track.choice.request.deadline_ms
            self._emit_error(track, f"not done within {limit} ms", "deadline_exceeded", now)

    # Bookkeeping

    def _check(self, request: Request) -> None:
        """Raise for a request that cannot run."""
        params, length = request.params, len(request.prompt)
        known = self._tracks.get(request.request_id)
        _require(length > 0, "prompt must not be empty", "prompt")
        _require(request.n >= 1, f"n ({request.n}) must be at least 1", "n")
        _require(params.max_tokens >= 0, f"max_tokens ({params.max_tokens}) is < 0", "max_tokens")
        _require(
            known is None or known[0].choice.request.attempt < request.attempt,
            f"request_id {request.request_id} is already running",
            "request_id",
        )
        outputs = [token for tokens in request.output_so_far for token in tokens]
        vocab_size = self._config.vocab_size
        for token in (*request.prompt, *outputs, *(t for t, _ in params.logit_bias)):
            _require(
                0 <= token < vocab_size, f"token id {token} must be below {vocab_size}", "prompt"
            )
        total = length + params.max_tokens
        if total > self.max_model_len:
            raise ContextLengthError(
                f"the maximum context length is {self.max_model_len} tokens, but the prompt has "
                f"{length} and max_tokens is {params.max_tokens}",
                "prompt",
            )
        longest = max(total - 1, length)
        if not self._scheduler.fits(longest):
            size = self._section.block_size_tokens
            raise ContextLengthError(
                f"prompt ({length} tokens) and max_tokens ({params.max_tokens}) need "
                f"{-(-longest // size)} KV blocks of {size} tokens, this worker has "
                f"{self._pool.num_blocks}",
                "prompt",
            )
        waiting = self._scheduler.num_waiting
        if waiting + request.n > max(self._section.max_waiting, request.n):
            raise QueueFullError(
                f"{waiting} sequences are waiting, at most {self._section.max_waiting} may"
            )

    def _track(self, choice: Choice, now: float) -> _Track:
        request, params = choice.request, choice.params
        counts = None
        if needs_counts(params):
            counts = TokenCounts(params, request.prompt, choice.output)
        wants_scores = params.prompt_logprobs is not None
        is_first = choice.choice == 0 and not choice.output
        return _Track(choice, now, counts=counts, wants_prompt_logprobs=wants_scores and is_first)

    def _find(self, choice: Choice) -> _Track:
        tracks = self._tracks[choice.request.request_id]
        return next(t for t in tracks if t.choice is choice)

    def _forget(self, track: _Track, reason: FinishReason) -> None:
        self._finished[reason] += 1
        request_id = track.choice.request.request_id
        tracks = self._tracks[request_id]
        tracks.remove(track)
        if not tracks:
            del self._tracks[request_id]

    def _note_first_dispatch(self, plan: Plan) -> None:
        when = self._runner.first_dispatch
        if when is not None:
            for planned in plan.rows:
                track = self._find(planned.sequence)
                if track.first_dispatch is None:
                    track.first_dispatch = when

    def _clear(self, dirty: Sequence[int]) -> None:
        """Blocks that may hold NaN must not meet their next holder as they are."""
        free = [block for block in set(dirty) if self._pool.is_free(block)]
        if free:
            self._cache.clear(free)

    def _count_load(self, result: StepResult) -> None:
        for load, topk_ids in zip(self._load, result.topk_ids, strict=True):
            for ids in topk_ids:
                load += torch.bincount(ids.flatten(), minlength=len(load)).to(load.device)

    # Numbers

    @property
    def num_blocks(self) -> int:
        """KV blocks in all."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that nobody holds."""
        return self._pool.num_free

    @property
    def recorder(self) -> Recorder | None:
        """Sees the inside of each step; None in serving."""
        return self._runner.recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._runner.recorder = recorder

    def expert_load(self) -> dict[tuple[str, int], NDArray[np.int64]]:
        """Rows routed to each logical expert since the start, by (bank, layer)."""
        return {
            (b.bank, b.layer): x.numpy().copy()
            for b, x in zip(self._banks, self._load, strict=True)
        }

    def stats(self) -> dict[str, float]:
        """Gauges and counters by metric name without prefix. Any thread may call it."""
        free, total = self._pool.num_free, self._pool.num_blocks
        numbers: Mapping[str, float] = {
            "num_requests_running": self._scheduler.num_running,
            "num_requests_waiting": self._scheduler.num_waiting,
            "kv_cache_usage_perc": 1 - free / total,
            "kv_blocks_free": free,
            "kv_blocks_total": total,
            "num_preemptions_total": self._scheduler.num_preemptions,
            **self._counters,
            **{f"request_{r.value}_total": count for r, count in self._finished.items()},
        }
        return {name: float(value) for name, value in numbers.items()}

    def check_integrity(self) -> None:
        """Assert that block accounting is exact; for tests."""
        self._scheduler.check_integrity()


def _output_so_far(request: Request, choice: int) -> tuple[int, ...]:
    return request.output_so_far[choice] if choice < len(request.output_so_far) else ()


def _timings(track: _Track, now: float) -> Timings:
    received = track.received
    return Timings(
        first_dispatch_s=(track.first_dispatch or now) - received,
        first_token_s=(track.first_token or now) - received,
        finished_s=now - received,
    )


def _require(ok: bool, message: str, param: str) -> None:
    if not ok:
        raise RequestError(message, param)
