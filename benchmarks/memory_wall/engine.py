"""Rows of ``benchmarks.memory_wall`` that run in one process, without a server or Ray."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.engine import step_cost
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.local_runs import WARM_UP_TOKENS, run_batch, threads_kept
from benchmarks.harness.prompts import random_prompts
from benchmarks.memory_wall.bounds import decode_bound, file_rate, forget_files, prefill_flops
from benchmarks.memory_wall.rows import LAYERS, MINI, Bench, Row, at_least, at_most
from benchmarks.report.timing import decode_interval_of
from cluster.config.cluster import EngineSection
from workers.experts.slots import ExpertSlots
from workers.model.compute_threads import ComputeThreads
from workers.model.huge_pages import collapse_weights
from workers.model.loading.attention_model import load_attention_model
from workers.model.loading.checkpoint import Checkpoint
from workers.native.thread_team import start_kernels

_PROMPT_TOKENS = 128
_NEW_TOKENS = 64
_STEP_BATCH = 64
_FEW, _MANY = 8, 256
"""Numbers of running requests whose steps are compared."""
_MOST_SHARE = 0.1
"""Largest allowed fraction of a step outside the kernels."""
_CPU = torch.device("cpu")


def decode(bench: Bench) -> list[Row]:
    """Decode rates of the small model."""
    asked = {1: at_least(0.8, 0.9), 8: at_least(0.7, 0.85), 32: at_least(0.45, 0.6)}
    return _decode(bench, "decode in one process", MINI, asked)


def layers(bench: Bench) -> list[Row]:
    """Decode rates of 4 layers with the width of OLMoE-1B-7B."""
    asked = {1: at_least(0.8, 0.9), 8: at_least(0.7, 0.9)}
    return _decode(bench, "decode, 4 layers of OLMoE-1B-7B", LAYERS, asked)


def _decode(bench: Bench, what: str, full: RandomModel, asked: dict[int, str]) -> list[Row]:
    """Decode rates by batch size compared with the memory bandwidth."""
    model = bench.size(full)
    prompt, new = bench.tokens(_PROMPT_TOKENS), bench.tokens(_NEW_TOKENS)
    rates: dict[int, list[float]] = {batch: [] for batch in asked}
    bounds: dict[int, list[float]] = {batch: [] for batch in asked}
    with threads_kept():
        engine = open_engine(bench, model)
        for batch in asked:
            run_batch(engine, random_prompts("warm", batch, prompt), WARM_UP_TOKENS)
        for repeat in range(bench.repeats):
            for batch in asked:
                bench.wait()
                bandwidth = bench.bandwidth(bench.cores)
                times = run_batch(engine, random_prompts(f"{repeat}", batch, prompt), new)
                rates[batch].append(decode_interval_of(times).tokens_per_s or 0.0)
                bounds[batch].append(decode_bound(model, batch, bandwidth))
    return [
        Row(
            what=f"{what}, batch {batch}",
            unit="tokens/s",
            measured=rates[batch],
            bound=bounds[batch],
            asked=words,
        )
        for batch, words in asked.items()
    ]


def prefill(bench: Bench) -> list[Row]:
    """Prefill rates of single prompts compared with the rate of a large matrix product."""
    model = bench.size(MINI)
    lengths = sorted({bench.tokens(512), bench.tokens(2000)})
    rates: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    bounds: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    with threads_kept():
        engine = open_engine(bench, model)
        for tokens in lengths:
            run_batch(engine, random_prompts("warm", 1, tokens), 1)
        for repeat in range(bench.repeats):
            for tokens in lengths:
                bench.wait()
                flops = bench.flops()
                ((took_s, *_),) = run_batch(engine, random_prompts(f"{repeat}", 1, tokens), 1)
                rates[tokens].append(tokens / took_s)
                bounds[tokens].append(tokens * flops / prefill_flops(model, tokens))
    return [
        Row(
            what=f"prefill of {tokens} tokens",
            unit="tokens/s",
            measured=rates[tokens],
            bound=bounds[tokens],
            asked=at_least(0.5, 0.7),
        )
        for tokens in lengths
    ]


def step(bench: Bench) -> list[Row]:
    """Time of decode steps outside the kernels, and growth of steps without a model."""
    model = bench.size(MINI)
    prompt, new = bench.tokens(_PROMPT_TOKENS), bench.tokens(_NEW_TOKENS)
    batch = bench.tokens(_STEP_BATCH)
    few, many = (
        replace(step_cost.QUICK if bench.is_tiny else step_cost.CASES[0], batch=n)
        for n in (_FEW, _MANY)
    )
    shares, growths = [], []
    with threads_kept():
        engine = open_engine(bench, model)
        run_batch(engine, random_prompts("warm", batch, prompt), WARM_UP_TOKENS)
        for repeat in range(bench.repeats):
            bench.wait()
            prompts = random_prompts(f"{repeat}", batch, prompt)
            shares.append(_share_outside(engine, prompts, new))
    with threads_kept():
        for _ in range(bench.repeats):
            bench.wait()
            costs = [sum(step_cost.measure(case).values()) for case in (few, many)]
            growths.append(costs[1] / costs[0])
    return [
        Row(
            what=f"time of a decode step outside kernels, batch {batch}",
            unit="fraction",
            measured=shares,
            bound=[_MOST_SHARE] * bench.repeats,
            asked=at_most(1, 0.5),
        ),
        Row(
            what=f"CPU time of a step outside the model, {_MANY} requests / {_FEW} requests",
            unit="factor",
            measured=growths,
            bound=[_MANY / _FEW] * bench.repeats,
            asked=at_most(1),
        ),
    ]


def _share_outside(engine: LocalEngine, prompts: list[list[int]], new_tokens: int) -> float:
    """Fraction of the time in which all sequences decode that is outside kernel calls."""
    marks: list[tuple[float, float]] = []
    assert engine.team is not None, "the share is measured of steps with compiled kernels"
    with timed_kernels(engine.team.library.functions) as kernel_s:
        start = time.perf_counter()
        times = run_batch(
            engine,
            prompts,
            new_tokens,
            lambda: marks.append((time.perf_counter() - start, kernel_s())),
        )
    interval = decode_interval_of(times)
    (begin, before), (end, after) = (
        min(marks, key=lambda mark: abs(mark[0] - limit))
        for limit in (interval.begin_s, interval.end_s)
    )
    return 1 - (after - before) / (end - begin)


@contextmanager
def timed_kernels(functions: ctypes.CDLL) -> Iterator[Callable[[], float]]:
    """Time every call of a library; yields a function that returns the seconds so far."""
    total_ns = 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function, assigned=(), updated=())
        def call(*arguments: object) -> Any:
            nonlocal total_ns
            start = time.perf_counter_ns()
            result = function(*arguments)
            total_ns += time.perf_counter_ns() - start
            return result

        return call

    loaded = {
        name: value
        for name, value in vars(functions).items()
        if callable(value) and not name.startswith("_")
    }
    for name, function in loaded.items():
        setattr(functions, name, timed(function))
    try:
        yield lambda: total_ns / 1e9
    finally:
        for name, function in loaded.items():
            setattr(functions, name, function)


def loading(bench: Bench) -> list[Row]:
    """Rates of loading and packing all weights compared with reading the files."""
    path = bench.checkpoint(bench.size(LAYERS))
    files = sorted({entry.file for entry in Checkpoint(path).tensors.values()})
    rows = []
    for kind in ("cold", "warm"):
        rates, bounds = [], []
        with threads_kept():
            for _ in range(bench.repeats):
                bench.wait()
                if kind == "cold":
                    forget_files(files)
                bounds.append(file_rate(files) / 1e6)
                if kind == "cold":
                    forget_files(files)
                rates.append(_load(path, bench.cores) / 1e6)
        rows.append(
            Row(
                what=f"loading of weights, {kind} page cache",
                unit="MB/s",
                measured=rates,
                bound=bounds,
                asked=at_least(0.7),
            )
        )
    return rows


def _load(path: Path, num_threads: int) -> float:
    """Bytes a second of loading all weights as workers do, including headers and huge pages."""
    team = start_kernels(num_threads).team
    threads = ComputeThreads.for_threads(num_threads)
    start = time.perf_counter()
    checkpoint = Checkpoint(path)
    banks = checkpoint.family.banks
    model = load_attention_model(
        checkpoint, torch.bfloat16, _CPU, compute_threads=threads, team=team
    )
    num_slots = max(bank.num_experts for bank in banks)
    slots = ExpertSlots(banks, num_slots, torch.bfloat16, _CPU, threads, team=team)
    slots.load_all(checkpoint)
    collapse_weights("cpu", checkpoint.loaded_bytes)
    took_s = time.perf_counter() - start
    del model, slots
    return checkpoint.loaded_bytes / took_s


def open_engine(
    bench: Bench,
    model: RandomModel,
    num_threads: int | None = None,
    num_micro_batches: int = 1,
    kv_cache_bytes: int | None = None,
    **options: Any,
) -> LocalEngine:
    """Open an engine in bfloat16, with a thread for each core if ``num_threads`` is None.

    ``options`` are passed to ``LocalEngine``.
    """
    return LocalEngine(
        bench.checkpoint(model),
        dtype="bfloat16",
        section=EngineSection(enable_prefix_caching=False, kv_cache_bytes=kv_cache_bytes),
        num_threads=num_threads or bench.cores,
        num_micro_batches=num_micro_batches,
        **options,
    )


ROWS: dict[str, Callable[[Bench], Sequence[Row]]] = {
    "decode": decode,
    "layers": layers,
    "prefill": prefill,
    "step": step,
    "loading": loading,
}
"""Name in ``--rows`` -> function that measures the rows."""
