"""Effect of ``--itl-target-ms`` on decoding streams when one long prompt arrives.

One local engine runs all targets; its policy for prompt rows is replaced between the runs. Each
policy keeps the step times that it has learned.
"""

from __future__ import annotations

import logging
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from msgspec import structs

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.report.quiet import wait_until_quiet
from benchmarks.report.results import table
from benchmarks.serving.throughput import TINY, random_model
from cluster.config.cluster import EngineSection
from workers.engine.prefill_cap import PrefillCap
from workers.requests.request import Request, SamplingParams

logger = logging.getLogger(__name__)

LONG = "long"
"""Name of the long request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    targets_ms: tuple[float | None, ...] = (None, 200.0, 100.0)
    """Values of the option; None disables it."""
    num_decodes: int = 16
    """Decoding streams."""
    prompt_tokens: int = 16
    """Length of their prompts."""
    new_tokens: int = 96
    """Output tokens of each stream."""
    steps_before: int = 16
    """Number of steps before the long prompt arrives."""
    long_tokens: int = 2000
    """Length of the long prompt."""
    repeats: int = 3
    """Runs of each target."""
    num_threads: int | None = 2
    """Compute threads; None keeps the default."""
    patience_s: float = 10.0
    """Longest wait for a quiet machine before a run."""


QUICK = Case(
    targets_ms=(None, 1.0),
    num_decodes=2,
    new_tokens=12,
    steps_before=2,
    long_tokens=40,
    repeats=1,
    num_threads=None,
    patience_s=0.0,
)
"""Enough to see that everything runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Results of one run."""

    itl_ms: float
    """Median time between two tokens of a decoding stream."""
    slow_itl_ms: float
    """99th percentile of the time between two tokens."""
    slowest_itl_ms: float
    """Longest time between two tokens."""
    ttft_ms: float
    """Time from the long prompt's arrival to its first token."""
    tokens_per_s: float
    """Tokens of the decoding streams in a second of the run."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = QUICK if quick else Case()
    with random_model(TINY if quick else RandomModel()) as checkpoint:
        return f"{_words(case)}\n\n{report(measure(checkpoint, case))}"


def measure(checkpoint: Path, case: Case) -> Mapping[float | None, Sequence[Run]]:
    """Run all targets in turns; returns the runs of each target."""
    plain = EngineSection(enable_prefix_caching=False)
    engine = LocalEngine(checkpoint, dtype="bfloat16", section=plain, num_threads=case.num_threads)
    caps = {t: PrefillCap.of(replace(plain, itl_target_ms=t)) for t in case.targets_ms}
    found: dict[float | None, list[Run]] = {target: [] for target in caps}
    for repeat in range(case.repeats + 1):
        for target, cap in caps.items():
            wait_until_quiet(time.monotonic() + case.patience_s)
            engine.prefill_cap = cap
            run = run_once(engine, case, seed=repeat)
            logger.info("run %d, target %s ms: %s", repeat, target, run)
            if repeat:  # the first one warms up
                found[target].append(run)
    return found


def run_once(engine: LocalEngine, case: Case, seed: int) -> Run:
    """Run decoding streams, and add a long prompt after some steps."""
    *streams, long = _requests(case, seed)
    for request in streams:
        engine.engine.add_request(request)
    times: defaultdict[str, list[float]] = defaultdict(list)
    num_steps, arrived = 0, 0.0
    begin = time.perf_counter()
    while engine.engine.has_work:
        if num_steps == case.steps_before:
            arrived = time.perf_counter()
            engine.engine.add_request(long)
        for output in engine.step():
            times[output.request_id] += [time.perf_counter()] * len(output.token_ids)
        num_steps += 1
    (first,) = times.pop(LONG)
    gaps = sorted((b - a) * 1000 for mine in times.values() for a, b in pairwise(mine))
    took = max(mine[-1] for mine in times.values()) - begin
    return Run(
        itl_ms=statistics.median(gaps),
        slow_itl_ms=gaps[len(gaps) * 99 // 100],
        slowest_itl_ms=gaps[-1],
        ttft_ms=(first - arrived) * 1000,
        tokens_per_s=sum(map(len, times.values())) / took,
    )


def report(found: Mapping[float | None, Sequence[Run]]) -> str:
    """Return a table with a row for each target."""
    head = ["target, ms", "ITL, median, ms", "ITL, p99, ms", "ITL, longest, ms"]
    head += ["TTFT of the long prompt, ms", "tokens/s of the streams"]
    return table(head, [["off" if t is None else f"{t:g}", *_cells(s)] for t, s in found.items()])


def _cells(runs: Sequence[Run]) -> list[str]:
    columns = (
        [t.itl_ms for t in runs],
        [t.slow_itl_ms for t in runs],
        [t.slowest_itl_ms for t in runs],
        [t.ttft_ms for t in runs],
        [t.tokens_per_s for t in runs],
    )
    return [f"{statistics.median(column):.1f}" for column in columns]


def _requests(case: Case, seed: int) -> list[Request]:
    """Requests with random token ids that exist in every measured vocabulary; the long one last."""
    draw = random.Random(seed)
    lengths = {f"s{i}": case.prompt_tokens for i in range(case.num_decodes)}
    lengths[LONG] = case.long_tokens
    params = SamplingParams(max_tokens=case.new_tokens, temperature=0.0, ignore_eos=True)
    return [
        Request(
            request_id=name,
            prompt=tuple(draw.choices(range(4, 256), k=length)),
            params=params if name != LONG else structs.replace(params, max_tokens=1),
        )
        for name, length in lengths.items()
    ]


def _words(case: Case) -> str:
    return (
        f"## Inter-token-latency target\n\n{case.num_decodes} streams decode {case.new_tokens} "
        f"tokens each; after {case.steps_before} steps a prompt of {case.long_tokens} tokens "
        "arrives. The local engine has two compute threads, a random OLMoE in bfloat16 and greedy "
        "sampling. `--itl-target-ms` limits the prompt rows of a step. ITL is the time between two "
        f"tokens of a stream over the whole run; values are medians of {case.repeats} runs."
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
