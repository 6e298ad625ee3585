"""What a running call adds to the metrics of its replica."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from gateway.generation.choices import Choice, Prompt
from gateway.observability.metrics import EngineMetrics, GatewayMetrics
from workers.requests.request import FinishReason, TokenOutput


class CallMetrics:
    """Decides what of a call is counted, and for which engine.

    A call of several prompts counts where its first prompt is, a choice where its prompt is.

    Args:
        metrics: of the replica.
        started_s: ``time.monotonic`` of the call's beginning.
    """

    def __init__(self, metrics: GatewayMetrics, started_s: float) -> None:
        self._metrics = metrics
        self._started_s = started_s
        self._is_submitted = False
        self._has_token = False

    def count_submitted(self, prompts: Collection[Prompt]) -> None:
        """All requests of the call are at the engines."""
        self._is_submitted = True
        first = next(iter(prompts))
        self._engine(first).observe("request_params_n", first.request.n)
        for prompt in prompts:
            engine, num_tokens = self._engine(prompt), len(prompt.request.prompt)
            engine.count("prompt_tokens", num_tokens)
            engine.observe("request_prompt_tokens", num_tokens)
            if max_tokens := prompt.request.params.max_tokens:  # else it is only read
                engine.observe("request_params_max_tokens", max_tokens)

    def count_prompt(self, prompt: Prompt, num_cached: int) -> None:
        """An engine has computed a prompt, except for ``num_cached`` tokens."""
        engine = self._engine(prompt)
        engine.count("prompt_tokens_cached", num_cached)
        num_computed = len(prompt.request.prompt) - num_cached
        engine.observe("request_prefill_kv_computed_tokens", num_computed)

    def observe_arrival(self, choice: Choice, output: TokenOutput, now_s: float) -> None:
        """Tokens of a choice arrived at ``now_s``."""
        count = len(output.token_ids)
        if not count:
            return
        engine = self._engine(choice.prompt)
        if not self._has_token:
            engine.observe("time_to_first_token_seconds", now_s - self._started_s)
            self._has_token = True
        if choice.last_token_s is None:
            choice.first_token_s, choice.first_timings = now_s, output.timings
        else:
            engine.observe("inter_token_latency_seconds", (now_s - choice.last_token_s) / count)
        choice.last_token_s = now_s

    def count_generated(self, choice: Choice, num_tokens: int) -> None:
        """Tokens of a choice that count."""
        self._engine(choice.prompt).count("generation_tokens", num_tokens)

    def count_end(self, choice: Choice) -> None:
        """A choice has ended by itself."""
        engine, tokens, finish = self._engine(choice.prompt), choice.text.num_tokens, choice.finish
        assert finish is not None, "it has ended"
        engine.add_success(finish.reason.value)
        engine.observe("request_generation_tokens", tokens)
        if finish.timings is not None:
            engine.observe_timings(finish.timings)
        if finish.beam_score is not None:
            return  # all its tokens came at once
        if tokens > 1 and choice.first_token_s is not None and choice.last_token_s is not None:
            mean_s = (choice.last_token_s - choice.first_token_s) / (tokens - 1)
            engine.observe("request_time_per_output_token_seconds", mean_s)

    def count_last_end(self, prompts: Collection[Prompt]) -> None:
        """All choices of the call have ended by themselves."""
        engine = self._engine(next(iter(prompts)))
        engine.observe("e2e_request_latency_seconds", time.monotonic() - self._started_s)
        longest = max(choice.text.num_tokens for prompt in prompts for choice in prompt.choices)
        engine.observe("request_max_num_generation_tokens", longest)

    def count_cut_off(self, choices: Iterable[Choice], reason: FinishReason) -> None:
        """The call is closed: choices without an end of their own end now."""
        for choice in choices if self._is_submitted else ():
            if choice.finish is None:
                self._engine(choice.prompt).add_success(reason.value)

    def count_rejection(self, limit: str) -> None:
        """An engine has refused a request of the call, whose queue is full."""
        self._metrics.admission_rejections.labels(limit).inc()

    def observe_lag(self, arrival_s: float) -> None:
        """Outputs that have waited since ``arrival_s`` were written to the client's connection."""
        self._metrics.stream_lag.observe(time.monotonic() - arrival_s)

    def _engine(self, prompt: Prompt) -> EngineMetrics:
        submission = prompt.submission
        return self._metrics.engine("" if submission is None else submission.engine)
