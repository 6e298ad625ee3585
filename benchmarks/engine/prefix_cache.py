"""Savings of the prefix cache for requests that begin with the same system prompt.

Two local engines in one process, one with the cache and one without, run in turns. A fixed number
of clients each send one request at a time. Each run has a new system prompt, so that the first
requests of a run always compute it.
"""

from __future__ import annotations

import itertools
import logging
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.report.quiet import QUIET_CORES, CpuClock, wait_until_quiet
from benchmarks.report.results import table
from benchmarks.serving.throughput import TINY, random_model
from cluster.config.cluster import EngineSection
from cluster.launch.model_source import bundled_checkpoint
from workers.requests.request import Request, SamplingParams

logger = logging.getLogger(__name__)

LABELS = {False: "off", True: "on"}
"""Labels in the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    num_requests: int = 48
    """Requests of a run."""
    num_clients: int = 8
    """Requests that run at the same time."""
    shared_tokens: int = 512
    """Length of the system prompt."""
    own_tokens: int = 32
    """Prompt tokens after the system prompt, different in each request."""
    new_tokens: int = 32
    """Output tokens of each request."""
    repeats: int = 3
    """Runs of each engine."""
    num_threads: int | None = 2
    """Compute threads; None keeps the default."""
    patience_s: float = 10.0
    """Longest time to wait for, and repeat a run for, other processes to be quiet."""


QUICK = Case(
    num_requests=4,
    num_clients=2,
    shared_tokens=40,
    own_tokens=4,
    new_tokens=3,
    repeats=1,
    num_threads=None,
    patience_s=0.0,
)
"""Enough to see that everything runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Results of one run."""

    ttft_ms: float
    """Median time from a request's start to its first token."""
    slow_ttft_ms: float
    """90th percentile of the time to the first token."""
    tokens_per_s: float
    """New tokens by the time from the first start to the last end."""
    hit_rate: float
    """Fraction of the prompt tokens that were cached."""
    others_cores: float = 0.0
    """CPU cores that other processes used during the run."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = QUICK if quick else Case()
    return _words(case) + "\n\n" + table(_HEAD, list(rows(case, quick)))


_HEAD = [
    "model, cache",
    "TTFT, median, ms",
    "TTFT, p90, ms",
    "tokens/s",
    "cached tokens",
    "other load",
]


def rows(case: Case, quick: bool) -> Iterator[list[str]]:
    """Rows of the table for both models."""
    yield from rows_of("bundled", measure(bundled_checkpoint(), case))
    with random_model(TINY if quick else RandomModel()) as checkpoint:
        yield from rows_of("random", measure(checkpoint, case))


def measure(checkpoint: Path, case: Case) -> Mapping[bool, Sequence[Run]]:
    """Runs with the cache off and on."""
    section = EngineSection(max_num_seqs=case.num_clients)
    engines = {
        is_on: LocalEngine(
            checkpoint,
            dtype="bfloat16",
            section=replace(section, enable_prefix_caching=is_on),
            num_threads=case.num_threads,
        )
        for is_on in LABELS
    }
    seeds = itertools.count()
    for engine in engines.values():
        warm_up = replace(case, num_requests=case.num_clients)
        run_once(engine, _requests(warm_up, next(seeds)), case.num_clients)
    found: dict[bool, list[Run]] = {is_on: [] for is_on in LABELS}
    for _ in range(case.repeats):
        for is_on, engine in engines.items():
            found[is_on].append(_quiet_run(engine, case, seeds))
            logger.info("cache %s: %s", LABELS[is_on], found[is_on][-1])
    return found


def _quiet_run(engine: LocalEngine, case: Case, seeds: Iterator[int]) -> Run:
    """Return a run, repeated within the time limit if other load disturbs it."""
    deadline = time.monotonic() + case.patience_s
    while True:
        wait_until_quiet(deadline)
        before = CpuClock.now()
        run = run_once(engine, _requests(case, next(seeds)), case.num_clients)
        others = before.others(CpuClock.now())
        if others < QUIET_CORES or time.monotonic() > deadline:
            return replace(run, others_cores=others)


def run_once(engine: LocalEngine, waiting: Sequence[Request], num_clients: int) -> Run:
    """Serve requests, ``num_clients`` of them at the same time."""
    left, started, first = list(waiting), dict[str, float](), dict[str, float]()
    before, begin = engine.engine.stats(), time.perf_counter()
    num_tokens = 0
    free = num_clients
    while left or engine.engine.has_work:
        while left and free:
            free -= 1
            started[left[0].request_id] = time.perf_counter()
            engine.engine.add_request(left.pop(0))
        for output in engine.step():
            num_tokens += len(output.token_ids)
            first.setdefault(output.request_id, time.perf_counter())
            free += output.finish_reason is not None
    took = time.perf_counter() - begin
    ttft = sorted((first[name] - start) * 1000 for name, start in started.items())
    names = ("prompt_tokens_cached_total", "prompt_tokens_total")
    cached, prompt = (engine.engine.stats()[name] - before[name] for name in names)
    return Run(
        ttft_ms=statistics.median(ttft),
        slow_ttft_ms=ttft[len(ttft) * 9 // 10],
        tokens_per_s=num_tokens / took,
        hit_rate=cached / prompt,
    )


def _requests(case: Case, seed: int) -> list[Request]:
    """Requests with random token ids that exist in every measured vocabulary."""
    draw = random.Random(seed)
    shared = draw.choices(range(4, 256), k=case.shared_tokens)
    params = SamplingParams(max_tokens=case.new_tokens, temperature=0.0, ignore_eos=True)
    return [
        Request(
            request_id=f"{seed}-{i}",
            prompt=(*shared, *draw.choices(range(4, 256), k=case.own_tokens)),
            params=params,
        )
        for i in range(case.num_requests)
    ]


def rows_of(model: str, found: Mapping[bool, Sequence[Run]]) -> Iterator[list[str]]:
    """Rows for the cache off, on, and the ratios."""
    for is_on, runs in found.items():
        yield [
            f"{model}, {LABELS[is_on]}",
            f"{statistics.median(t.ttft_ms for t in runs):.1f}",
            f"{statistics.median(t.slow_ttft_ms for t in runs):.1f}",
            f"{statistics.median(t.tokens_per_s for t in runs):.1f}",
            f"{statistics.median(t.hit_rate for t in runs):.0%}",
            f"{statistics.median(t.others_cores for t in runs):.1f}",
        ]
    pairs = list(zip(found[True], found[False], strict=True))
    ttft = statistics.median(on.ttft_ms / off.ttft_ms for on, off in pairs)
    rate = statistics.median(on.tokens_per_s / off.tokens_per_s for on, off in pairs)
    yield [f"{model}, on / off", f"{ttft:.2f}", "", f"{rate:.2f}", "", ""]


def _words(case: Case) -> str:
    return (
        f"## Prefix cache\n\nThe local engine with two compute threads runs {case.num_requests} "
        f"requests, {case.num_clients} at a time, in bfloat16 with greedy sampling. All prompts "
        f"share their first {case.shared_tokens} tokens, followed by {case.own_tokens} tokens of "
        f"their own; each output has {case.new_tokens} tokens. The models are the bundled model "
        f"and a random OLMoE. Medians of {case.repeats} runs; ratios are medians of the ratios "
        "within a run. Other load: CPU cores that other processes used during the runs."
    )
