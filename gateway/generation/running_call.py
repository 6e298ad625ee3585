"""A running call: engine outputs in, pieces of text for the client out.

A ``RunningCall`` must be closed, best with ``with``: closing it is immediate, ends whatever still
runs in the engines and gives its place in the queue back, whether the client got everything, left,
or was too late.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any

from cluster.core.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    NotReadyError,
    QueueFullError,
    RequestAbortedError,
)
from gateway.auth.key_limits import KeyUsage
from gateway.core.call import GenerateCall
from gateway.core.delta import ChoiceDelta, Finish, TokenText, Usage
from gateway.core.errors import SlowClientError, error_from_engine
from gateway.engines.submission import Submission
from gateway.generation.admission import Ticket
from gateway.generation.choices import Choice, Found, Prompt
from gateway.generation.output_queue import OutputQueue
from gateway.observability.metrics import EngineMetrics, GatewayMetrics
from gateway.text.answer_region import AnswerRegion
from gateway.text.detokenizer import (
    ChoiceText,
    Detokenizer,
    StopStrings,
    aligned,
    make_detokenizer,
    place_tokens,
)
from gateway.text.tokenizer import Tokenizer
from workers.requests.request import FinishReason, Request, Timings, TokenOutput

_VERDICT_S = 0.25
"""Time after a deadline that a worker has to say whether it had begun with the request."""
_INLINE_TOKENS = 1024
"""Texts of longer prompts are made in a thread."""
_NO_WORKER_RETRY_S = 2.0
"""Retry time for requests that found no worker in place of a lost one."""


@dataclass(eq=False)
class RunningCall(AbstractContextManager["RunningCall"]):
    """See the module. Made by ``Gateway.start``. Times are those of ``time.monotonic``."""

    call: GenerateCall
    requests: Sequence[Request]
    """One a prompt, at least one; choice j of request i has index i * n + j."""
    call_id: str
    """Its name, with which the names of its requests begin."""
    _: KW_ONLY
    created: int
    """Unix time, seconds."""
    queue: OutputQueue
    ticket: Ticket
    """The place in the gateway's queue."""
    deadline_s: float
    tokenizer: InitVar[Tokenizer | None]
    """None makes no text."""
    eos_token_ids: Collection[int]
    """The model's own ends."""
    metrics: GatewayMetrics
    started_s: float
    admitted_s: float
    closed_s: float = 0.0
    """When it was closed; 0 before."""
    caches_prefixes: bool = False
    """The engines report how much of a prompt was cached."""
    caller: KeyUsage | None = None
    """Pays for its tokens."""
    held: ExitStack = field(default_factory=ExitStack)
    """Closed at its end."""
    free: Callable[[Sequence[list[Any]]], None] = lambda values: None
    """Called at its end with lists that are not read any more, to free them in a thread."""

    def __post_init__(self, tokenizer: Tokenizer | None) -> None:
        call = self.call
        self.queue.on_overflow = self.close
        self._tokenizer = None if call.token_ids_only else tokenizer
        self._has_token = False
        self._is_counted = False
        self._cut_off = FinishReason.ABORT  # why choices end that the engines do not finish
        self._changed: dict[Choice, None] = {}
        self._prompts = {
            request.request_id: self._make_prompt(index, request)
            for index, request in enumerate(self.requests)
        }
        self._num_running = self._num_open = len(self.requests) * call.num_drawn
        self._num_prompt_tokens = sum(len(request.prompt) for request in self.requests)
        self._pay(self._num_prompt_tokens)

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def prompts(self) -> Collection[Prompt]:
        return self._prompts.values()

    @property
    def makes_text(self) -> bool:
        """Its tokens are made into text."""
        return self._tokenizer is not None

    @property
    def is_finished(self) -> bool:
        """Every choice has ended, and ``next`` has returned its end."""
        return self._num_open == 0

    @property
    def first_token_s(self) -> float | None:
        """When its first token came; None before."""
        times = [c.first_token_s for c in self._all_choices() if c.first_token_s is not None]
        return min(times, default=None)

    @property
    def usage(self) -> Usage:
        completion = sum(choice.text.num_tokens for choice in self._all_choices())
        cached = sum(prompt.cached_tokens or 0 for prompt in self._prompts.values())
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=completion,
            cached_tokens=cached if self.caches_prefixes else None,
        )

    async def read(self) -> list[Found]:
        """Run to the end; what was read of each prompt. Raises what ``next`` raises."""
        while await self.next():
            pass
        return [prompt.found for prompt in self._prompts.values()]

    def assigned(self, request_id: str, submission: Submission) -> None:
        """Note that the engines have a request."""
        self._prompts[request_id].submission = submission

    def handed_over(self) -> None:
        """Count what was asked for, once all requests are assigned."""
        self._is_counted = True
        prompts = list(self._prompts.values())
        self._engine(prompts[0]).observe("request_params_n", self.call.num_drawn)
        for prompt in prompts:
            engine, num_tokens = self._engine(prompt), len(prompt.request.prompt)
            engine.count("prompt_tokens", num_tokens)
            engine.observe("request_prompt_tokens", num_tokens)
            if max_tokens := prompt.request.params.max_tokens:  # else it is only read
                engine.observe("request_params_max_tokens", max_tokens)

    async def next(self, timeout_s: float | None = None) -> list[ChoiceDelta]:
        """The next pieces of the choices, at least one; empty after ``timeout_s``.

        Raises:
            DeadlineExceededError: the call's time is over.
            NotReadyError: it is over, and a request waits for a worker in place of a lost one.
            ExpertMeshError: an engine could not finish it.
        """
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.is_finished:
            now_s = time.monotonic()
            deadline_s = self.deadline_s + (_VERDICT_S if self._awaits_verdict() else 0.0)
            if now_s >= deadline_s:
                self._cut_off = FinishReason.ERROR
                raise self._too_late()
            if give_up_s is not None and now_s >= give_up_s:
                break
            wake_s = deadline_s if give_up_s is None else min(give_up_s, deadline_s)
            await self._take_all(wake_s - now_s)
            if self.call.echo or self.call.prompt_logprobs is not None:
                await self._prepare_prompts()
            deltas = self._deltas()
            if deltas:
                return deltas
        return []

    async def _take_all(self, timeout_s: float) -> None:
        try:
            for output in await self.queue.take(timeout_s):
                self._take(output)
        except (RequestAbortedError, SlowClientError):
            raise
        except ExpertMeshError:
            self._cut_off = FinishReason.ERROR
            raise

    def _awaits_verdict(self) -> bool:
        """Whether all requests are at workers, which alone know whether they have begun."""
        if self._has_token:
            return False
        entries = [prompt.submission for prompt in self._prompts.values()]
        return all(one is not None and one.was_sent and not one.is_waiting for one in entries)

    def _too_late(self) -> ExpertMeshError:
        entries = [prompt.submission for prompt in self._prompts.values()]
        lost = (entry for entry in entries if entry is not None and entry.was_sent)
        if any(entry.is_waiting for entry in lost):
            reason = "the worker was lost, and no other came within the request's time"
            return NotReadyError(reason, "not_ready", _NO_WORKER_RETRY_S)
        return DeadlineExceededError("the request's time is over", self._has_token)

    def sent(self) -> None:
        """Note that the pieces of the last ``next`` are on their way to the client."""
        self.metrics.stream_lag.observe(time.monotonic() - self.queue.oldest_s)

    def close(self) -> None:
        """End it now; never waits, and does no harm when repeated."""
        if self.closed_s:
            return
        self.closed_s = time.monotonic()
        self.held.close()
        for prompt in self._prompts.values():
            if prompt.submission is not None:
                prompt.submission.abort()
        self.ticket.release(self.closed_s, self._has_token or self.is_finished)
        self._observe_cut_off()
        self._pay(self.usage.completion_tokens)
        echoes = [prompt.echo[1] for prompt in self._prompts.values() if prompt.echo is not None]
        scores = [prompt.logprobs for prompt in self._prompts.values() if prompt.logprobs]
        self.free([*echoes, *scores])

    def _pay(self, num_tokens: int) -> None:
        if self.caller is not None:
            self.caller.spend_tokens(num_tokens, time.monotonic())

    def _make_prompt(self, index: int, request: Request) -> Prompt:
        call = self.call
        entry = Prompt(index, request, 0 if self.caches_prefixes else None)
        before = () if request.prompt_embeds is not None else request.prompt
        for number in range(call.num_drawn):
            stop = StopStrings(call.stop, call.include_stop_str_in_output)
            text = ChoiceText(
                self._detokenizer(before),
                stop,
                request.params.min_tokens,
                _answer_region(call),
                call.stop_token_ids if call.stops_in_answer else (),
            )
            entry.choices.append(Choice(entry, number, text))
        return entry

    def _detokenizer(
        self, before: tuple[int, ...] = (), keeps_special: bool = False
    ) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        skips_special = self.call.skip_special_tokens and not keeps_special
        return make_detokenizer(self._tokenizer, skips_special, before)

    def _all_choices(self) -> Iterable[Choice]:
        return (choice for prompt in self._prompts.values() for choice in prompt.choices)

    def _take(self, output: TokenOutput) -> None:
        prompt = self._prompts[output.request_id]
        if output.prompt_logprobs is not None and prompt.scores is None:
            prompt.scores = output.prompt_logprobs
            self._changed.update(dict.fromkeys(prompt.choices))
        choice = prompt.choices[output.choice]
        if choice.finish is not None:
            return  # overshoot after a stop string
        if output.finish_reason is FinishReason.ERROR:
            message = output.error or "the engine could not finish the request"
            raise self._engine_error(message, output)
        if not (choice.number or output.index):  # not what another worker found later
            self._take_prompt(prompt, output.num_cached_tokens or 0)
        if output.arrays or output.class_logits:
            prompt.found = Found(output.arrays, output.class_logits)
        self._changed[choice] = None
        self._observe_tokens(choice, output)
        num_before = choice.text.num_tokens
        stopped = self._feed(choice, output)
        self._engine(prompt).count("generation_tokens", choice.text.num_tokens - num_before)
        if stopped is not None:
            self._finish(choice, FinishReason.STOP, stopped, None)
            if prompt.submission is not None:
                prompt.submission.abort((choice.number,))
        elif output.finish_reason is not None:
            choice.text.finish()
            stop, timings = output.stop_token_id, output.timings
            self._finish(choice, output.finish_reason, stop, timings, output.score)

    def _take_prompt(self, prompt: Prompt, num_cached: int) -> None:
        """The engine has computed a prompt, but for what it found in its cache."""
        if self.caches_prefixes:
            prompt.cached_tokens = num_cached
        num_computed, engine = len(prompt.request.prompt) - num_cached, self._engine(prompt)
        engine.count("prompt_tokens_cached", num_cached)
        engine.observe("request_prefill_kv_computed_tokens", num_computed)

    def _engine_error(self, message: str, output: TokenOutput) -> ExpertMeshError:
        code, param = output.error_code, output.error_param
        timings = output.timings
        has_begun = timings is not None and timings.first_dispatch_s < timings.finished_s
        error = error_from_engine(message, code, self._has_token or has_begun, param)
        if not isinstance(error, QueueFullError):
            return error
        limit = "worker_queue_full"
        self.metrics.admission_rejections.labels(limit).inc()
        return QueueFullError(message, self.ticket.retry_after_s(), limit)

    def _feed(self, choice: Choice, output: TokenOutput) -> str | int | None:
        last = len(output.token_ids) - 1
        ends = output.finish_reason is FinishReason.STOP
        hides_end = ends and not self.call.include_stop_str_in_output
        hidden_ends = {output.stop_token_id, *self.eos_token_ids} if hides_end else set()
        for place, token_id in enumerate(output.token_ids):
            logprob = output.logprobs[place] if output.logprobs else None
            hidden = place == last and token_id in hidden_ends
            stopped = choice.text.feed(token_id, logprob, hidden)
            if stopped is not None:
                return stopped
        return None

    def _finish(
        self,
        choice: Choice,
        reason: FinishReason,
        stop_reason: str | int | None,
        timings: Timings | None,
        beam_score: float | None = None,
    ) -> None:
        tokens = choice.text.num_tokens
        usage = Usage(
            prompt_tokens=len(choice.prompt.request.prompt),
            completion_tokens=tokens,
            cached_tokens=choice.prompt.cached_tokens,
        )
        choice.finish = Finish(
            reason=reason,
            stop_reason=stop_reason,
            usage=usage,
            timings=timings,
            beam_score=beam_score,
        )
        self._observe_choice(choice, choice.finish)
        self._num_running -= 1
        if not self._num_running:
            self._observe_call()

    def _deltas(self) -> list[ChoiceDelta]:
        deltas = []
        for choice in list(self._changed):
            if choice.prompt.waits_for_logprobs:
                continue
            del self._changed[choice]
            delta = self._delta(choice)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _delta(self, choice: Choice) -> ChoiceDelta | None:
        if choice.has_ended:
            return None
        text, tokens = choice.text.take(always=choice.finish is not None)
        echo_text, echo_tokens = self._echo(choice.prompt)
        if choice.is_first:
            text = echo_text + text
        if not (text or tokens or choice.finish):
            return None
        shows_prompt = choice.is_first and self.call.prompt_logprobs is not None
        delta = ChoiceDelta(
            index=choice.prompt.index * self.call.num_drawn + choice.number,
            prompt_index=choice.prompt.index,
            is_first=choice.is_first,
            cached_tokens=choice.prompt.cached_tokens,
            text=text,
            tokens=tuple(
                TokenText(token.token_id, token.text_offset + len(echo_text), token.logprob)
                for token in tokens
            )
            if echo_text
            else tokens,
            echo_tokens=echo_tokens if choice.is_first else (),
            prompt_logprobs=choice.prompt.logprobs if shows_prompt else None,
            finish=choice.finish,
        )
        choice.is_first = False
        if choice.finish is not None:
            choice.has_ended = True
            self._num_open -= 1
        return delta

    async def _prepare_prompts(self) -> None:
        """Decode scores and make texts of the prompts that are sent next; of long ones in a
        thread.
        """
        prompts = {choice.prompt for choice in self._changed if choice.is_first}
        ready = [p for p in prompts if not p.waits_for_logprobs]

        def make() -> None:
            for prompt in ready:
                if prompt.scores is not None and prompt.logprobs is None:
                    prompt.logprobs = prompt.scores.entries()
                self._echo(prompt)

        if sum(len(prompt.request.prompt) for prompt in ready) <= _INLINE_TOKENS:
            make()
        else:
            await asyncio.to_thread(make)

    def _echo(self, prompt: Prompt) -> tuple[str, list[TokenText]]:
        if not self.call.echo:
            return "", []
        if prompt.echo is None:
            given, logprobs = self.call.prompt_text(prompt.index), prompt.logprobs or ()
            has_text = given is not None and self.makes_text
            detokenizer = self._detokenizer(keeps_special=has_text)  # a given text may have some
            text, tokens = place_tokens(detokenizer, prompt.request.prompt, logprobs)
            prompt.echo = aligned(given or "", text, tokens) if has_text else (text, tokens)
        return prompt.echo

    def _observe_tokens(self, choice: Choice, output: TokenOutput) -> None:
        count = len(output.token_ids)
        if not count:
            return
        now_s, engine = time.monotonic(), self._engine(choice.prompt)
        if not self._has_token:
            engine.observe("time_to_first_token_seconds", now_s - self.started_s)
            self._has_token = True
        if choice.last_token_s is None:
            choice.first_token_s, choice.first_timings = now_s, output.timings
        else:
            engine.observe("inter_token_latency_seconds", (now_s - choice.last_token_s) / count)
        choice.last_token_s = now_s

    def _observe_choice(self, choice: Choice, finish: Finish) -> None:
        engine, tokens = self._engine(choice.prompt), choice.text.num_tokens
        engine.add_success(finish.reason.value)
        engine.observe("request_generation_tokens", tokens)
        if finish.timings is not None:
            engine.observe_timings(finish.timings)
        if finish.beam_score is not None:
            return  # all its tokens came at once
        if tokens > 1 and choice.first_token_s is not None and choice.last_token_s is not None:
            mean_s = (choice.last_token_s - choice.first_token_s) / (tokens - 1)
            engine.observe("request_time_per_output_token_seconds", mean_s)

    def _observe_cut_off(self) -> None:
        """Count choices that end now, without an end of their own."""
        for choice in self._all_choices() if self._is_counted else ():
            if choice.finish is None:
                self._engine(choice.prompt).add_success(self._cut_off.value)

    def _observe_call(self) -> None:
        engine = self._engine(next(iter(self._prompts.values())))
        engine.observe("e2e_request_latency_seconds", time.monotonic() - self.started_s)
        longest = max(choice.text.num_tokens for choice in self._all_choices())
        engine.observe("request_max_num_generation_tokens", longest)

    def _engine(self, prompt: Prompt) -> EngineMetrics:
        """Metrics of the engine that has a prompt."""
        submission = prompt.submission
        return self.metrics.engine("" if submission is None else submission.engine)


def _answer_region(call: GenerateCall) -> AnswerRegion | None:
    """Where stops count in a choice; None: everywhere."""
    if not call.stops_in_answer:
        return None
    if call.thinking is not None:
        return AnswerRegion.after_thinking(call.thinking)
    return AnswerRegion.of_harmony(call.open_message)
