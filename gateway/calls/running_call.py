"""A running call: converts engine outputs to pieces of text for the client.

A ``RunningCall`` must be closed, preferably by ``with``, whether the client received everything,
disconnected or exceeded its deadline. Closing does not wait: it aborts the requests that still run
in the engines and releases the entry in the queue.
"""

from __future__ import annotations

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
from gateway.calls.admission import Ticket
from gateway.calls.call_metrics import CallMetrics
from gateway.calls.choices import Choice, Prompt, PromptResults, make_prompt
from gateway.calls.output_queue import OutputQueue
from gateway.calls.prompt_echo import PromptEcho
from gateway.core.call import GenerateCall
from gateway.core.delta import ChoiceDelta, TokenText, Usage
from gateway.core.errors import SlowClientError, error_from_engine
from gateway.engines.submission import Submission
from gateway.observability.metrics import GatewayMetrics
from gateway.text.tokenizer import Tokenizer
from workers.requests.request import FinishReason, Request, TokenOutput

_BEGIN_REPORT_S = 0.25
"""Seconds after a deadline in which a worker can still report whether it has begun the request."""
_NO_WORKER_RETRY_S = 2.0
"""Retry time in seconds for requests that lost their worker when no other worker was ready."""


@dataclass(eq=False)
class RunningCall(AbstractContextManager["RunningCall"]):
    """An admitted call whose requests are sent to the engines. Made by ``Gateway.start``.

    Times are ``time.monotonic`` seconds.
    """

    call: GenerateCall
    requests: Sequence[Request]
    """Engine requests, one per prompt, at least one. Choice j of request i has index i * n + j."""
    call_id: str
    """Id of the call, and prefix of the ids of its engine requests."""
    _: KW_ONLY
    created: int
    """Unix time at which the call was created, in seconds."""
    queue: OutputQueue
    ticket: Ticket
    """Entry of the call in the gateway's queue (admission)."""
    deadline_s: float
    tokenizer: Tokenizer | None
    """Tokenizer of the model; None if it has none."""
    eos_token_ids: Collection[int]
    """End-of-text tokens of the model."""
    metrics: InitVar[GatewayMetrics]
    started_s: float
    admitted_s: float
    closed_s: float = 0.0
    """Monotonic time at which the call was closed; 0 before."""
    fingerprint: str = ""
    """Identity of release and configuration, as ``system_fingerprint`` of OpenAI."""
    revision: str = ""
    """``model/revision`` that serves the call."""
    caches_prefixes: bool = False
    """Whether the engines report how many tokens of a prompt were cached."""
    caller: KeyUsage | None = None
    """API key that is charged for the call's tokens; None if no key is required."""
    held: ExitStack = field(default_factory=ExitStack)
    """Resources that are released at the end of the call."""
    free: Callable[[Sequence[list[Any]]], None] = lambda values: None
    """Function called at the call's end with large lists, to free their memory in a thread."""

    def __post_init__(self, metrics: GatewayMetrics) -> None:
        call = self.call
        self.queue.on_overflow = self.close
        tokenizer = None if call.token_ids_only else self.tokenizer
        self.makes_text = tokenizer is not None
        self._echo = PromptEcho(call, tokenizer)
        self._metrics = CallMetrics(metrics, self.started_s)
        self._has_token = False
        self._cut_off = FinishReason.ABORT  # finish reason of unfinished choices
        self._changed: dict[Choice, None] = {}
        self._prompts = {
            request.request_id: make_prompt(call, index, request, tokenizer, self.caches_prefixes)
            for index, request in enumerate(self.requests)
        }
        self._num_running = self._num_open = len(self.requests) * call.num_sampled
        self._num_prompt_tokens = sum(len(request.prompt) for request in self.requests)
        self._charge_tokens(self._num_prompt_tokens)

    def __exit__(self, *error: object) -> None:
        self.close()
        self.queue.forget_error()

    @property
    def prompts(self) -> Collection[Prompt]:
        return self._prompts.values()

    @property
    def is_finished(self) -> bool:
        """Whether ``next`` has returned the last piece of every choice."""
        return self._num_open == 0

    @property
    def first_token_s(self) -> float | None:
        """Monotonic time at which the call's first token arrived; None before."""
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

    async def read(self) -> list[PromptResults]:
        """Run a call that generates no text to its end; return the results by prompt.

        Raises the errors of ``next``.
        """
        while await self.next():
            pass
        return [prompt.results for prompt in self._prompts.values()]

    def set_submission(self, request_id: str, submission: Submission) -> None:
        """Record that the engine request with this id was submitted to an engine."""
        self._prompts[request_id].submission = submission

    def mark_submitted(self) -> None:
        """Count the call in the metrics. Called after all its requests were submitted."""
        self._metrics.count_submitted(self._prompts.values())

    async def next(self, timeout_s: float | None = None) -> list[ChoiceDelta]:
        """Wait for the next pieces of the choices and return them.

        The list is empty after ``timeout_s`` seconds (None: no limit) or at the end of the call.

        Raises:
            DeadlineExceededError: the call's deadline has passed.
            NotReadyError: the deadline has passed after a request lost its worker.
            ExpertMeshError: an engine could not finish the call.
        """
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.is_finished:
            now_s = time.monotonic()
            deadline_s = self.deadline_s + (
                _BEGIN_REPORT_S if self._is_decided_by_workers() else 0.0
            )
            if now_s >= deadline_s:
                self._cut_off = FinishReason.ERROR
                raise self._deadline_error()
            if give_up_s is not None and now_s >= give_up_s:
                break
            wake_s = deadline_s if give_up_s is None else min(give_up_s, deadline_s)
            await self._take_all(wake_s - now_s)
            if self._echo.is_shown:
                await self._echo.prepare({c.prompt for c in self._changed if c.is_first})
            deltas = self._deltas()
            if deltas:
                return deltas
        return []

    async def _take_all(self, timeout_s: float) -> None:
        try:
            outputs = await self.queue.take(timeout_s)
            for output, arrival_s in zip(outputs, self.queue.arrivals_s, strict=True):
                self._take(output, arrival_s)
        except (RequestAbortedError, SlowClientError):
            raise
        except ExpertMeshError:
            self._cut_off = FinishReason.ERROR
            raise

    def _is_decided_by_workers(self) -> bool:
        """Return whether all requests are at workers, but no token has arrived yet.

        In this case, only the workers know whether the requests run.
        """
        if self._has_token:
            return False
        entries = [prompt.submission for prompt in self._prompts.values()]
        return all(one is not None and one.was_sent and not one.is_waiting for one in entries)

    def _deadline_error(self) -> ExpertMeshError:
        entries = [prompt.submission for prompt in self._prompts.values()]
        lost = (entry for entry in entries if entry is not None and entry.was_sent)
        if any(entry.is_waiting for entry in lost):
            reason = "the worker was lost, and no other worker was ready before the deadline"
            return NotReadyError(reason, "not_ready", _NO_WORKER_RETRY_S)
        return DeadlineExceededError("the request's deadline has passed", self._has_token)

    def mark_sent(self) -> None:
        """Record in the metrics that the result of the last ``next`` was written to the client."""
        self._metrics.observe_lag(self.queue.oldest_s)

    def close(self) -> None:
        """End the call without waiting: abort running requests and release its resources.

        Idempotent.
        """
        if self.closed_s:
            return
        self.closed_s = time.monotonic()
        self.queue.on_overflow = lambda: None  # no cycle with the call
        self.held.close()
        for prompt in self._prompts.values():
            if prompt.submission is not None:
                prompt.submission.abort()
        self.ticket.release(self.closed_s, self._has_token or self.is_finished)
        self._metrics.count_cut_off(self._all_choices(), self._cut_off)
        self._charge_tokens(self.usage.completion_tokens)
        echoes = [prompt.echo[1] for prompt in self._prompts.values() if prompt.echo is not None]
        scores = [prompt.logprobs for prompt in self._prompts.values() if prompt.logprobs]
        self.free([*echoes, *scores])

    def _charge_tokens(self, num_tokens: int) -> None:
        if self.caller is not None:
            self.caller.spend_tokens(num_tokens, time.monotonic())

    def _all_choices(self) -> Iterable[Choice]:
        return (choice for prompt in self._prompts.values() for choice in prompt.choices)

    def _take(self, output: TokenOutput, arrival_s: float) -> None:
        prompt = self._prompts[output.request_id]
        if output.prompt_logprobs is not None and prompt.scores is None:
            prompt.scores = output.prompt_logprobs
            self._changed.update(dict.fromkeys(prompt.choices))
        choice = prompt.choices[output.choice]
        if choice.finish is not None:
            return  # tokens that the engine sampled after a stop string
        if output.finish_reason is FinishReason.ERROR:
            message = output.error or "the engine could not finish the request"
            raise self._engine_error(message, output)
        if not (choice.number or output.index):  # counts a prompt once, also if it moves
            num_cached = output.num_cached_tokens or 0
            if self.caches_prefixes:
                prompt.cached_tokens = num_cached
            self._metrics.count_prompt(prompt, num_cached)
        if output.arrays or output.class_logits:
            prompt.results = PromptResults(output.arrays, output.class_logits)
        self._changed[choice] = None
        self._has_token = self._has_token or bool(output.token_ids)
        self._metrics.observe_arrival(choice, output, arrival_s)
        num_before = choice.text.num_tokens
        stopped = choice.feed(output, self._hidden_ends(output))
        self._metrics.count_generated(choice, choice.text.num_tokens - num_before)
        if stopped is not None:
            choice.end(FinishReason.STOP, stopped)
            if prompt.submission is not None:
                prompt.submission.abort((choice.number,))
        elif output.finish_reason is not None:
            choice.text.finish()
            choice.end(output.finish_reason, output.stop_token_id, output.timings, output.score)
        if choice.finish is not None:
            self._metrics.count_end(choice)
            self._num_running -= 1
            if not self._num_running:
                self._metrics.count_last_end(self._prompts.values())

    def _hidden_ends(self, output: TokenOutput) -> Collection[int | None]:
        """Return the token ids whose text is omitted if they end the text of an output."""
        ends = output.finish_reason is FinishReason.STOP
        if not ends or self.call.include_stop_str_in_output:
            return ()
        return {output.stop_token_id, *self.eos_token_ids}

    def _engine_error(self, message: str, output: TokenOutput) -> ExpertMeshError:
        code, param = output.error_code, output.error_param
        timings = output.timings
        has_begun = timings is not None and timings.first_dispatch_s < timings.finished_s
        error = error_from_engine(message, code, self._has_token or has_begun, param)
        if not isinstance(error, QueueFullError):
            return error
        limit = "worker_queue_full"
        self._metrics.count_rejection(limit)
        return QueueFullError(message, self.ticket.retry_after_s(), limit)

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
        echo_text, echo_tokens = self._echo.take(choice.prompt)
        if choice.is_first:
            text = echo_text + text
        if not (text or tokens or choice.finish):
            return None
        shows_prompt = choice.is_first and self.call.prompt_logprobs is not None
        delta = ChoiceDelta(
            index=choice.prompt.index * self.call.num_sampled + choice.number,
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
