"""Metrics of a running call: counts and latencies of its tokens, choices and prompts."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from gateway.calls.choices import Choice, Prompt
from gateway.observability.metrics import EngineMetrics, GatewayMetrics
from workers.requests.request import FinishReason, TokenOutput


class CallMetrics:
    """Counts a call in the metrics of its replica, by engine.

    A call counts for the engine (attention worker) of its first prompt; a choice counts for the
    engine of its prompt.

    Args:
        metrics: metrics of the replica.
        started_s: time of the call's start, by ``time.monotonic``.
    """

    def __init__(self, metrics: GatewayMetrics, started_s: float) -> None:
        self._metrics = metrics
        self._started_s = started_s
        self._is_submitted = False
        self._has_token = False

    def count_submitted(self, prompts: Collection[Prompt]) -> None:
        """Count the call, whose requests were all sent to the engines, and its prompts."""
        self._is_submitted = True
        first = next(iter(prompts))
        self._engine(first).observe("request_params_n", first.request.n)
        for prompt in prompts:
            engine, num_tokens = self._engine(prompt), len(prompt.request.prompt)
            engine.count("prompt_tokens", num_tokens)
            engine.observe("request_prompt_tokens", num_tokens)
            if max_tokens := prompt.request.params.max_tokens:  # 0: the prompt is only read
                engine.observe("request_params_max_tokens", max_tokens)

    def count_prompt(self, prompt: Prompt, num_cached: int) -> None:
        """Count a prompt that an engine has computed; ``num_cached`` of its tokens were cached."""
        engine = self._engine(prompt)
        engine.count("prompt_tokens_cached", num_cached)
        num_computed = len(prompt.request.prompt) - num_cached
        engine.observe("request_prefill_kv_computed_tokens", num_computed)

    def observe_arrival(self, choice: Choice, output: TokenOutput, now_s: float) -> None:
        """Record the latency of a choice's tokens in ``output``, which arrived at ``now_s``."""
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
        """Count ``num_tokens`` generated tokens of a choice."""
        self._engine(choice.prompt).count("generation_tokens", num_tokens)

    def count_end(self, choice: Choice) -> None:
        """Count a choice that has finished."""
        engine, tokens, finish = self._engine(choice.prompt), choice.text.num_tokens, choice.finish
        assert finish is not None, "the choice has not finished"
        engine.add_success(finish.reason.value)
        engine.observe("request_generation_tokens", tokens)
        if finish.timings is not None:
            engine.observe_timings(finish.timings)
        if finish.beam_score is not None:
            return  # all its tokens arrived together
        if tokens > 1 and choice.first_token_s is not None and choice.last_token_s is not None:
            mean_s = (choice.last_token_s - choice.first_token_s) / (tokens - 1)
            engine.observe("request_time_per_output_token_seconds", mean_s)

    def count_last_end(self, prompts: Collection[Prompt]) -> None:
        """Count the call when all its choices have finished."""
        engine = self._engine(next(iter(prompts)))
        engine.observe("e2e_request_latency_seconds", time.monotonic() - self._started_s)
        longest = max(choice.text.num_tokens for prompt in prompts for choice in prompt.choices)
        engine.observe("request_max_num_generation_tokens", longest)

    def count_cut_off(self, choices: Iterable[Choice], reason: FinishReason) -> None:
        """Count the unfinished choices of a closed call with ``reason``."""
        for choice in choices if self._is_submitted else ():
            if choice.finish is None:
                self._engine(choice.prompt).add_success(reason.value)

    def count_rejection(self, limit: str) -> None:
        """Count a request that an engine with a full queue refused; ``limit`` names the limit."""
        self._metrics.admission_rejections.labels(limit).inc()

    def observe_lag(self, arrival_s: float) -> None:
        """Record the time from ``arrival_s``, when outputs arrived, to their write to clients."""
        self._metrics.stream_lag.observe(time.monotonic() - arrival_s)

    def _engine(self, prompt: Prompt) -> EngineMetrics:
        submission = prompt.submission
        return self._metrics.engine("" if submission is None else submission.engine)
