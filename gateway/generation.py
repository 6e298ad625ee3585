"""A running call: engine outputs in, pieces of text for the client out.

A ``Generation`` must be closed, best with ``with``: closing it is immediate, ends whatever still
runs in the engines and gives its place in the queue back, whether the client got everything, left,
or was too late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType

from cluster.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    NotReadyError,
    QueueFullError,
)
from gateway.admission import Ticket
from gateway.call import CallPrompt, GenerateCall
from gateway.call_notes import CallNotes, ChoiceNotes, PromptNotes
from gateway.delta import ChoiceDelta, Finish, Usage
from gateway.errors import error_from_engine
from gateway.key_limits import Account
from gateway.metrics import EngineMetrics, GatewayMetrics
from gateway.output_queue import OutputQueue
from gateway.submission import Submission
from gateway.text import (
    ChoiceText,
    Detokenizer,
    StopStrings,
    TokenText,
    make_detokenizer,
    place_tokens,
)
from gateway.tokenizer import Tokenizer
from workers.inspection import NamedArray
from workers.request import FinishReason, Timings, TokenLogprob, TokenOutput

_VERDICT_S = 0.25
"""Time after a deadline that a worker has to say whether it had begun with the request."""
_NO_WORKER_RETRY_S = 2.0
"""Retry time for requests that found no worker in place of a lost one."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was read of one prompt, beside tokens."""

    arrays: tuple[NamedArray, ...] = ()
    """Of its inspection."""
    class_logits: tuple[float, ...] = ()
    """Of a sequence classifier, without an inspection."""


class _Choice:
    """One choice on its way."""

    def __init__(self, prompt: _Prompt, number: int, text: ChoiceText) -> None:
        self.prompt = prompt
        self.number = number
        self.text = text
        self.finish: Finish | None = None
        self.is_first = True
        self.is_told = False
        self.last_token_s: float | None = None
        self.first_token_s: float | None = None
        self.first_timings: Timings | None = None

    def notes(self) -> ChoiceNotes:
        """For the call's trace."""
        submission, finish = self.prompt.submission, self.finish
        return ChoiceNotes(
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            first_timings=self.first_timings,
            last_timings=finish.timings if finish else None,
            finish_reason=finish.reason if finish else None,
            token_ids=submission.outputs[self.number] if submission else (),
        )


class _Prompt:
    """One prompt on its way, with its engine request."""

    def __init__(
        self, index: int, prompt: CallPrompt, waits_for_logprobs: bool, caches_prefixes: bool
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.submission: Submission | None = None
        self.choices: list[_Choice] = []
        self.logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.waits_for_logprobs = waits_for_logprobs
        self.cached_tokens = 0 if caches_prefixes else None
        self.echo: tuple[str, tuple[TokenText, ...]] | None = None
        self.found = Found()

    def notes(self) -> PromptNotes:
        """For the call's trace."""
        submission = self.submission
        return PromptNotes(
            worker=submission.worker if submission else "",
            cached_tokens=self.cached_tokens,
            replays_s=submission.replays_s if submission else (),
            choices=[choice.notes() for choice in self.choices],
        )


class Generation:
    """See the module. Made by ``Gateway.start``.

    Args:
        call: what is generated.
        call_id: its name, which its requests' names begin with.
        created: Unix time, seconds.
        queue: where the engines' outputs arrive.
        ticket: the place in the queue.
        deadline_s: ``time.monotonic`` after which it fails.
        tokenizer: None makes no text.
        eos_token_ids: the model's own ends.
        metrics: where it is counted.
        started_s: ``time.monotonic`` of the call.
        admitted_s: ``time.monotonic`` of its place in the queue.
        caches_prefixes: the engines tell how much of a prompt was cached.
        caller: whose it is, and pays for its tokens.
        on_close: called once, at its end.
    """

    def __init__(
        self,
        call: GenerateCall,
        call_id: str,
        *,
        created: int,
        queue: OutputQueue,
        ticket: Ticket,
        deadline_s: float,
        tokenizer: Tokenizer | None,
        eos_token_ids: Iterable[int],
        metrics: GatewayMetrics,
        started_s: float,
        admitted_s: float,
        caches_prefixes: bool = False,
        caller: Account | None = None,
        on_close: Callable[[OutputQueue], None] = lambda queue: None,
    ) -> None:
        self.call = call
        self.call_id = call_id
        self.created = created
        self.queue = queue
        self._ticket = ticket
        self._caller = caller
        self._on_close = on_close
        self._deadline_s = deadline_s
        self._tokenizer = None if call.token_ids_only else tokenizer
        self._ends = frozenset(eos_token_ids)
        self._metrics = metrics
        self._started_s = started_s
        self._admitted_s = admitted_s
        self._closed_s = 0.0
        self._caches_prefixes = caches_prefixes
        self._is_closed = False
        self._has_token = False
        self._changed: dict[_Choice, None] = {}
        self._prompts = {
            f"{call_id}-{place}": self._make_prompt(place, prompt)
            for place, prompt in enumerate(call.prompts)
        }
        self._num_running = self._num_untold = call.num_choices
        self._pay(call.num_prompt_tokens)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_finished(self) -> bool:
        """Every choice has ended, and its end was told."""
        return self._num_untold == 0

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        completion = sum(choice.text.num_tokens for choice in self._all_choices())
        cached = sum(prompt.cached_tokens or 0 for prompt in self._prompts.values())
        return Usage(
            prompt_tokens=self.call.num_prompt_tokens,
            completion_tokens=completion,
            cached_tokens=cached if self._caches_prefixes else None,
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
        prompts = list(self._prompts.values())
        self._engine(prompts[0]).request_params_n.observe(self.call.n)
        for prompt in prompts:
            engine, num_tokens = self._engine(prompt), len(prompt.prompt.ids)
            engine.prompt_tokens.inc(num_tokens)
            engine.request_prompt_tokens.observe(num_tokens)
            engine.request_params_max_tokens.observe(prompt.prompt.params.max_tokens)

    async def next(self, timeout_s: float | None = None) -> list[ChoiceDelta]:
        """The news that are there, after waiting for some; empty after ``timeout_s``.

        Raises:
            DeadlineExceededError: the call's time is over.
            NotReadyError: it is over, and a request waits for a worker in place of a lost one.
            ExpertMeshError: an engine could not finish it.
        """
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.is_finished:
            now_s = time.monotonic()
            deadline_s = self._deadline_s + (_VERDICT_S if self._awaits_verdict() else 0.0)
            if now_s >= deadline_s:
                raise self._too_late()
            if give_up_s is not None and now_s >= give_up_s:
                break
            wake_s = deadline_s if give_up_s is None else min(give_up_s, deadline_s)
            outputs = await self.queue.take(wake_s - now_s)
            for output in outputs:
                self._take(output)
            deltas = self._deltas()
            if deltas:
                return deltas
        return []

    def _awaits_verdict(self) -> bool:
        """Workers have all of it, and only they know whether they have begun."""
        entries = [prompt.submission for prompt in self._prompts.values()]
        sent = all(one is not None and one.was_sent and not one.is_waiting for one in entries)
        return sent and not self._has_token

    def _too_late(self) -> ExpertMeshError:
        entries = [prompt.submission for prompt in self._prompts.values()]
        lost = (entry for entry in entries if entry is not None and entry.was_sent)
        if any(entry.is_waiting for entry in lost):
            reason = "the worker was lost, and no other came within the request's time"
            return NotReadyError(reason, "not_ready", _NO_WORKER_RETRY_S)
        return DeadlineExceededError("the request's time is over", self._has_token)

    def sent(self) -> None:
        """The news of the last ``next`` are on their way to the client."""
        self._metrics.stream_lag.observe(time.monotonic() - self.queue.oldest_s)

    def close(self) -> None:
        """End it now; never waits, and does no harm when repeated."""
        if self._is_closed:
            return
        self._is_closed = True
        self._closed_s = time.monotonic()
        self._on_close(self.queue)
        for prompt in self._prompts.values():
            if prompt.submission is not None:
                prompt.submission.abort()
        self._ticket.release(self._closed_s)
        self._pay(self.usage.completion_tokens)

    def notes(self) -> CallNotes:
        """What is known of it, best when it is closed."""
        return CallNotes(
            call=self.call,
            call_id=self.call_id,
            started_s=self._started_s,
            admitted_s=self._admitted_s,
            heard_s=self.queue.oldest_s,
            closed_s=self._closed_s or time.monotonic(),
            usage=self.usage,
            makes_text=self._tokenizer is not None,
            prompts=[prompt.notes() for prompt in self._prompts.values()],
        )

    def _pay(self, num_tokens: int) -> None:
        if self._caller is not None:
            self._caller.spend_tokens(num_tokens, time.monotonic())

    def _make_prompt(self, place: int, prompt: CallPrompt) -> _Prompt:
        waits = prompt.params.prompt_logprobs is not None
        entry = _Prompt(place, prompt, waits, self._caches_prefixes)
        entry.choices = [
            _Choice(entry, number, self._make_text(prompt)) for number in range(self.call.n)
        ]
        return entry

    def _make_text(self, prompt: CallPrompt) -> ChoiceText:
        call = self.call
        stop = StopStrings(call.stop, call.include_stop_str_in_output)
        before = () if prompt.embeds is not None else prompt.ids
        return ChoiceText(self._detokenizer(before), stop, prompt.params.min_tokens)

    def _detokenizer(self, before: tuple[int, ...] = ()) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        return make_detokenizer(self._tokenizer, self.call.skip_special_tokens, before)

    def _all_choices(self) -> Iterable[_Choice]:
        return (choice for prompt in self._prompts.values() for choice in prompt.choices)

    def _take(self, output: TokenOutput) -> None:
        prompt = self._prompts[output.request_id]
        if output.prompt_logprobs is not None and prompt.logprobs is None:
            prompt.logprobs = output.prompt_logprobs
            self._changed.update(dict.fromkeys(prompt.choices))
        choice = prompt.choices[output.choice]
        is_first = not (choice.number or output.index)  # not what another worker found later
        if self._caches_prefixes and output.num_cached_tokens and is_first:
            prompt.cached_tokens = output.num_cached_tokens
        if choice.finish is not None:
            return  # overshoot after a stop string
        if output.finish_reason is FinishReason.ERROR:
            message = output.error or "the engine could not finish the request"
            raise self._engine_error(message, output)
        if output.arrays or output.class_logits:
            prompt.found = Found(output.arrays, output.class_logits)
        self._changed[choice] = None
        self._observe_tokens(choice, output)
        stopped = self._feed(choice, output)
        if stopped is not None:
            self._finish(choice, FinishReason.STOP, stopped, None)
            if prompt.submission is not None:
                prompt.submission.abort((choice.number,))
        elif output.finish_reason is not None:
            choice.text.finish()
            self._finish(choice, output.finish_reason, output.stop_token_id, output.timings)

    def _engine_error(self, message: str, output: TokenOutput) -> ExpertMeshError:
        code, param = output.error_code, output.error_param
        timings = output.timings
        has_begun = timings is not None and timings.first_dispatch_s < timings.finished_s
        error = error_from_engine(message, code, self._has_token or has_begun, param)
        if not isinstance(error, QueueFullError):
            return error
        limit = "worker_queue_full"
        self._metrics.admission_rejections.add(limit)
        return QueueFullError(message, self._ticket.retry_after_s(), limit)

    def _feed(self, choice: _Choice, output: TokenOutput) -> str | None:
        last = len(output.token_ids) - 1
        ends = output.finish_reason is FinishReason.STOP
        for place, token_id in enumerate(output.token_ids):
            logprob = output.logprobs[place] if output.logprobs else None
            is_end = ends and place == last and self._is_end(token_id, output)
            hidden = is_end and not self.call.include_stop_str_in_output
            stopped = choice.text.feed(token_id, logprob, hidden)
            if stopped is not None:
                return stopped
        return None

    def _is_end(self, token_id: int, output: TokenOutput) -> bool:
        return token_id == output.stop_token_id or token_id in self._ends

    def _finish(
        self,
        choice: _Choice,
        reason: FinishReason,
        stop_reason: str | int | None,
        timings: Timings | None,
    ) -> None:
        tokens = choice.text.num_tokens
        usage = Usage(
            prompt_tokens=len(choice.prompt.prompt.ids),
            completion_tokens=tokens,
            cached_tokens=choice.prompt.cached_tokens,
        )
        choice.finish = Finish(reason=reason, stop_reason=stop_reason, usage=usage, timings=timings)
        self._observe_choice(choice, choice.finish)
        self._num_running -= 1
        if not self._num_running:
            self._observe_call()

    def _deltas(self) -> list[ChoiceDelta]:
        deltas = []
        for choice in list(self._changed):
            if choice.prompt.waits_for_logprobs and choice.prompt.logprobs is None:
                continue
            del self._changed[choice]
            delta = self._delta(choice)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _delta(self, choice: _Choice) -> ChoiceDelta | None:
        if choice.is_told:
            return None
        text, tokens = choice.text.take(always=choice.finish is not None)
        echo_text, echo_tokens = self._echo(choice.prompt)
        if choice.is_first:
            text = echo_text + text
        if not (text or tokens or choice.finish):
            return None
        delta = ChoiceDelta(
            index=choice.prompt.index * self.call.n + choice.number,
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
            prompt_logprobs=self._prompt_logprobs(choice),
            finish=choice.finish,
        )
        choice.is_first = False
        if choice.finish is not None:
            choice.is_told = True
            self._num_untold -= 1
        return delta

    def _prompt_logprobs(self, choice: _Choice) -> tuple[TokenLogprob | None, ...] | None:
        wants = choice.is_first and self.call.prompt_logprobs is not None
        return choice.prompt.logprobs if wants else None

    def _echo(self, prompt: _Prompt) -> tuple[str, tuple[TokenText, ...]]:
        if not self.call.echo:
            return "", ()
        if prompt.echo is None:
            prompt.echo = self._make_echo(prompt)
        return prompt.echo

    def _make_echo(self, prompt: _Prompt) -> tuple[str, tuple[TokenText, ...]]:
        ids, given = prompt.prompt.ids, prompt.prompt.text
        detokenizer = self._detokenizer()
        logprobs = prompt.logprobs or ()
        if detokenizer is None:
            places = enumerate(ids)
            return "", tuple(TokenText(i, 0, logprobs[p] if logprobs else None) for p, i in places)
        text, tokens = place_tokens(detokenizer, ids, logprobs)
        return (text if given is None else given), tokens

    def _observe_tokens(self, choice: _Choice, output: TokenOutput) -> None:
        count = len(output.token_ids)
        if not count:
            return
        now_s, engine = time.monotonic(), self._engine(choice.prompt)
        if not self._has_token:
            engine.time_to_first_token.observe(now_s - self._started_s)
            self._has_token = True
        if choice.last_token_s is None:
            choice.first_token_s, choice.first_timings = now_s, output.timings
        else:
            engine.inter_token_latency.observe((now_s - choice.last_token_s) / count)
        choice.last_token_s = now_s

    def _observe_choice(self, choice: _Choice, finish: Finish) -> None:
        engine, tokens = self._engine(choice.prompt), choice.text.num_tokens
        engine.add_success(finish.reason.value)
        engine.generation_tokens.inc(tokens)
        engine.request_generation_tokens.observe(tokens)
        if finish.timings is not None:
            engine.observe_timings(finish.timings)
        if tokens > 1 and choice.first_token_s is not None and choice.last_token_s is not None:
            mean_s = (choice.last_token_s - choice.first_token_s) / (tokens - 1)
            engine.time_per_output_token.observe(mean_s)

    def _observe_call(self) -> None:
        engine = self._engine(next(iter(self._prompts.values())))
        engine.e2e_latency.observe(time.monotonic() - self._started_s)
        longest = max(choice.text.num_tokens for choice in self._all_choices())
        engine.request_max_num_generation_tokens.observe(longest)

    def _engine(self, prompt: _Prompt) -> EngineMetrics:
        """Where what concerns a prompt is counted."""
        submission = prompt.submission
        return self._metrics.engine("" if submission is None else submission.engine)
