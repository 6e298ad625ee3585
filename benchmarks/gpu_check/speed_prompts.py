"""Prefill by the number of tokens in a step, and the delay of decoding sequences by prompts.

The knee of the first is the default of ``--max-num-batched-tokens`` on GPUs
(``GPU_STEP_TOKENS``). For the second, prompts arrive at a share of the rate of prefill while
other sequences decode, and the times between the tokens of these are compared with those without
prompts.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.checkpoints.random_checkpoint import TINY
from benchmarks.gpu_check.ceilings import matrix_rate
from benchmarks.gpu_check.device import synchronize
from benchmarks.gpu_check.section import Place, Report
from benchmarks.gpu_check.speed import OLMOE, Run, fill, make_engine, prefill
from benchmarks.gpu_check.step_costs import median_step_s, steps
from benchmarks.harness.prompts import random_prompts
from workers.engine.prefill_cap import PrefillCap
from workers.requests.request import Request, SamplingParams

_STEP_TOKENS = (512, 1024, 2048, 4096, 8192)
_MIXED_TOKENS = (64, 128, 256, 512, 2048)
"""Prompt tokens in a step beside decoding sequences."""
_STREAMS = 64
_PROMPT = 512
_SHARE = 0.3
"""Rate of arriving prompt tokens as a fraction of the rate of prefill."""
_MIXED_STEPS = 150
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def run(place: Place, report: Report) -> None:
    """Measure prefill by tokens in a step, then decode steps while prompts arrive."""
    model = TINY if place.is_tiny else OLMOE
    context, streams = place.size(1024, 24), place.size(_STREAMS, 2)
    given = Run(
        place=place,
        model=model,
        engine=make_engine(place, model, context, 2 * streams),
        context=context,
        read_rate=1.0,
        matrix_rate=matrix_rate(place.device, place.size(8192, 64)),
    )
    found = {number: prefill(given, number) for number in _STEP_TOKENS[: place.size(5, 1)]}
    report.value("prefill by tokens in a step", found)
    shares = [f"{one['share_of_bound']:.2f} ({number})" for number, one in found.items()]
    report.say(f"prefill {', '.join(shares)} of the bound")
    rate = max(one["tokens_per_s"] for one in found.values())
    mixed = _arrivals(given, streams, rate)
    report.value("decode while prompts arrive", mixed)
    ratios = [f"{one['p50_times']:.2f} ({number})" for number, one in mixed.items()]
    report.say(f"prefill {', '.join(shares)} of the bound; ITL beside prompts {', '.join(ratios)}")


def _arrivals(given: Run, streams: int, prefill_rate: float) -> dict[int, dict[str, Any]]:
    """Return times between tokens of ``streams`` sequences by the prompt tokens in a step.

    ``prefill_rate``: tokens a second. ``p50_times``: the median divided by that without prompts.
    """
    place, engine = given.place, given.engine
    tokens = len(_MIXED_TOKENS) * (_MIXED_STEPS + 1) + 64
    params = SamplingParams(max_tokens=place.size(tokens, 64), temperature=0.0, ignore_eos=True)
    names, _ = fill(given, streams, place.size(256, 8), params)
    steps(engine, place.size(4, 1))
    alone_s = median_step_s(engine, place.size(24, 2))
    prompt = place.size(_PROMPT, 16)
    every_s = prompt / (_SHARE * prefill_rate)
    found: dict[int, dict[str, Any]] = {}
    for number in _MIXED_TOKENS[: place.size(len(_MIXED_TOKENS), 1)]:
        engine.prefill_cap = PrefillCap(max_rows=number)
        times, waiting = _steps_with_prompts(given, f"beside {number}", prompt, every_s, set(names))
        times.sort()
        median_s = times[len(times) // 2]
        found[number] = {
            "p50_s": median_s,
            "p99_s": times[int(0.99 * len(times))],
            "p50_times": median_s / alone_s,
            "alone_s": alone_s,
            "waiting_tokens": waiting,
        }
    for name in names:
        engine.engine.abort(name)
    return found


def _steps_with_prompts(
    given: Run, name: str, prompt_tokens: int, every_s: float, streams: set[str]
) -> tuple[list[float], int]:
    """Run steps while a prompt arrives every ``every_s`` seconds.

    Returns seconds between the tokens of ``streams``, and the prompt tokens that wait at the end.
    """
    engine, number = given.engine, given.place.size(_MIXED_STEPS, 4)
    prompts = random_prompts(name, number + 1, prompt_tokens)
    synchronize(given.place.device)
    times: list[float] = []
    sent, start = 0, time.perf_counter()
    last = start
    while len(times) < number:
        while sent < len(prompts) and last - start >= sent * every_s:
            request = Request(
                request_id=f"{name}, {sent}", prompt=tuple(prompts[sent]), params=_ONE_TOKEN
            )
            engine.add_request(request)
            sent += 1
        outputs = engine.step()
        assert engine.engine.rows_wanted().decode_rows, "the streams have ended"
        if any(output.request_id in streams for output in outputs):
            now = time.perf_counter()
            times.append(now - last)
            last = now
    waiting = engine.engine.rows_wanted().prefill_rows
    for index in range(sent):
        engine.engine.abort(f"{name}, {index}")
    return times, waiting
