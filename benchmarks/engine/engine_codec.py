"""Time to encode and decode engine stream messages: ``python -m benchmarks.engine_codec``.

Times are CPU times of one core, the shortest of several runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from workers.requests.request import (
    Request,
    SamplingParams,
    StepOutput,
    TokenLogprob,
    TokenOutput,
)
from workers.requests.wire import FROM_ENGINE, TO_ENGINE

NUM_SEQUENCES = 32
PROMPT_TOKENS = 512
RUNS = 9
REPEATS = 300


def step(num_logprobs: int) -> StepOutput:
    """Return a message with one token of each sequence."""
    values = tuple(-0.5 * token for token in range(num_logprobs))
    entry = TokenLogprob(
        token_id=5, logprob=-0.5, rank=1, top_ids=tuple(range(num_logprobs)), top_logprobs=values
    )
    outputs = tuple(
        TokenOutput(
            request_id=f"cmpl-{place:032x}",
            attempt=0,
            choice=0,
            index=100 + place,
            token_ids=(4000 + place,),
            logprobs=(entry,) if num_logprobs else (),
        )
        for place in range(NUM_SEQUENCES)
    )
    return StepOutput(outputs=outputs)


def request() -> Request:
    """Return a request with a prompt and a few options."""
    params = SamplingParams(max_tokens=256, temperature=0.7, top_p=0.9, seed=1, stop_token_ids=(2,))
    prompt = tuple(range(1000, 1000 + PROMPT_TOKENS))
    return Request(request_id="cmpl-" + "0" * 32, prompt=prompt, params=params, deadline_ms=60_000)


def microseconds(work: Callable[[], object], runs: int = RUNS, repeats: int = REPEATS) -> float:
    """CPU time of one call."""
    times = []
    for _ in range(runs):
        began = time.process_time()
        for _ in range(repeats):
            work()
        times.append(time.process_time() - began)
    return min(times) / repeats * 1e6


def rows(runs: int = RUNS, repeats: int = REPEATS) -> list[str]:
    """Return a row for each message: bytes, time to encode and time to decode."""
    steps = {"step": step(0), "step with 5 log-probabilities": step(5)}
    lines = [
        _row(name, FROM_ENGINE.encode, FROM_ENGINE.decode, message, runs, repeats)
        for name, message in steps.items()
    ]
    return [*lines, _row("request", TO_ENGINE.encode, TO_ENGINE.decode, request(), runs, repeats)]


def _row(
    name: str,
    encode: Callable[[Any], bytes],
    decode: Callable[[bytes], object],
    message: object,
    runs: int,
    repeats: int,
) -> str:
    data = encode(message)
    assert decode(data) == message
    there = microseconds(lambda: encode(message), runs, repeats)
    back = microseconds(lambda: decode(data), runs, repeats)
    return f"| {name} | {len(data)} | {there:.1f} | {back:.1f} |"


def main() -> None:
    """Print the table."""
    lines = [
        "| message | size, bytes | time to encode, µs | time to decode, µs |",
        "| --- | ---: | ---: | ---: |",
        *rows(),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
