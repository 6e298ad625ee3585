"""Rows of ``benchmarks.memory_wall`` that need several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.engine import dispatch
from benchmarks.engine.idle_ranks import Shape
from benchmarks.engine.profile import StepSums, timed_by
from benchmarks.harness.local_runs import WARM_UP_TOKENS, run_batch, threads_kept
from benchmarks.harness.prompts import random_prompts
from benchmarks.harness.systems import System, running
from benchmarks.harness.worker_memory import memory_of_workers
from benchmarks.memory_wall.bounds import decode_bound, two_worker_cap
from benchmarks.memory_wall.engine import open_engine
from benchmarks.memory_wall.rows import LAYERS, MINI, WHOLE, Bench, Row, at_least, at_most
from benchmarks.report.timing import Times, decode_interval_of
from workers.metrics.step_timer import StepTimer
from workers.requests.step_header import StepHeader

_LAYOUTS = {1: "ray-one-micro-batch", 2: "ray-two-micro-batches"}
"""Micro-batches of a step -> 1 + 1 workers in ``child.SYSTEMS``."""
_BATCH = 32
_PROMPT_TOKENS = 128
_NEW_TOKENS = 64
_WHOLE_TOKENS = 32
"""Prompt tokens, and new tokens, of the whole OLMoE-1B-7B."""
_EXCHANGE_ROWS = 8
_EXCHANGE_DEADLINE_S = 600.0
_EXCHANGE_LIMIT_US, _EXCHANGE_AIM_US = 150.0, 60.0


class _FullSteps(StepSums):
    """Sums of the steps in which all sequences decode."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self._batch = batch

    def begin_step(self, header: StepHeader) -> bool:
        super().begin_step(header)
        return header.decode_rows == self._batch and not header.prefill_rows

    def take(self) -> tuple[float, float]:
        """Return mean milliseconds of a step in attention and in experts, and reset the sums."""
        found = self.results()["decode"]
        self.clear()
        experts = found["stages_ms"]["dispatch"]
        return found["step_ms"] - experts, experts


class _OneCore:
    """The model in one process with one thread, to time attention and experts on one core."""

    def __init__(self, bench: Bench, batch: int, num_micro_batches: int) -> None:
        self._sums = _FullSteps(batch)
        self._timer = StepTimer(self._sums)
        self._engine = open_engine(
            bench, bench.size(MINI), 1, num_micro_batches, wrap=timed_by(self._timer)
        )

    def measure(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """Run a batch; returns mean milliseconds of a step in attention and in experts."""
        run_batch(self._engine, prompts, new_tokens, lambda: self._timer.end_step("sample"))
        return self._sums.take()


def workers(bench: Bench) -> list[Row]:
    """Rows of 1 + 1 workers with a core each, measured at their engine stream."""
    model = bench.size(MINI)
    batch, new = bench.tokens(_BATCH), bench.tokens(_NEW_TOKENS)
    prompt = bench.tokens(_PROMPT_TOKENS)
    used: dict[int, list[float]] = {parts: [] for parts in _LAYOUTS}
    caps: dict[int, list[float]] = {parts: [] for parts in _LAYOUTS}
    rates, bounds = [], []
    with running(list(_LAYOUTS.values()), bench.checkpoint(model)) as systems, threads_kept():
        alone = {parts: _OneCore(bench, batch, parts) for parts in _LAYOUTS}
        for name in _LAYOUTS.values():
            systems[name].generate(random_prompts("warm", batch, prompt), WARM_UP_TOKENS)
        for repeat in range(bench.repeats):
            prompts = random_prompts(f"{repeat}", batch, prompt)
            for parts, name in _LAYOUTS.items():
                bench.wait()
                attention, experts = alone[parts].measure(prompts, new)
                step_ms = 1e3 * batch / _rate(systems[name].generate(prompts, new))
                used[parts].append((attention + experts) / (2 * step_ms))
                caps[parts].append(two_worker_cap(attention, experts))
            rates.append(_single_rate(bench, systems[_LAYOUTS[1]], prompt, new, repeat))
            bounds.append(decode_bound(model, 1, bench.bandwidth(1)))
    rows = [
        Row(
            what=f"use of 2 cores by 1 + 1 workers, batch {batch}, micro-batches: {parts}",
            unit="fraction",
            measured=used[parts],
            bound=caps[parts],
            asked=at_least(0.9, 0.95),
        )
        for parts in _LAYOUTS
    ]
    single = Row(
        what="decode, 1 + 1 workers, batch 1",
        unit="tokens/s",
        measured=rates,
        bound=bounds,
        asked=at_least(0.8, 0.9),
    )
    return [*rows, single]


def whole(bench: Bench) -> list[Row]:
    """Decode rate of OLMoE-1B-7B with random weights on 1 + 1 workers with a core each."""
    model, tokens = bench.size(WHOLE), bench.tokens(_WHOLE_TOKENS)
    rates, bounds = [], []
    with running(["ray"], bench.checkpoint(model)) as systems:
        systems["ray"].generate(random_prompts("warm", 1, tokens), WARM_UP_TOKENS)
        for repeat in range(bench.repeats):
            rates.append(_single_rate(bench, systems["ray"], tokens, tokens, repeat))
            bounds.append(decode_bound(model, 1, bench.bandwidth(1)))
    return [
        Row(
            what="decode, random OLMoE-1B-7B, 1 + 1 workers, batch 1",
            unit="tokens/s",
            measured=rates,
            bound=bounds,
            asked=at_least(0.6, 0.8),
        )
    ]


def _single_rate(
    bench: Bench, system: System, prompt_tokens: int, new_tokens: int, repeat: int
) -> float:
    """Tokens a second of one sequence after its first token."""
    bench.wait()
    return _rate(system.generate(random_prompts(f"{repeat}", 1, prompt_tokens), new_tokens))


def _rate(times: Times) -> float:
    """Tokens a second while all sequences decode."""
    rate = decode_interval_of(times).tokens_per_s
    assert rate is not None, "there is more than one new token"
    return rate


def exchange(bench: Bench) -> list[Row]:
    """Time of dispatch and combine in one layer, without the experts' computation."""
    rows = []
    for width in (MINI.hidden, LAYERS.hidden):
        shape = Shape(
            attention_ranks=1,
            expert_ranks=2,
            width=width,
            num_experts=MINI.experts,
            top_k=MINI.top_k,
            max_rows=_EXCHANGE_ROWS,
            layers=MINI.layers,
        )
        steps = 20 if bench.is_tiny else 1000
        plan = dispatch.Plan(shape=shape, tokens=(_EXCHANGE_ROWS,), repeats=steps)
        medians = []
        for _ in range(bench.repeats):
            bench.wait()
            found = dispatch.measure(plan, _EXCHANGE_DEADLINE_S)[str(_EXCHANGE_ROWS)]
            medians.append(found["exchange_us"]["median"] - found["experts_us"]["median"])
        rows.append(
            Row(
                what=f"exchange of a layer, 1 + 2 workers, {_EXCHANGE_ROWS} rows of width {width}",
                unit="us",
                measured=medians,
                bound=[_EXCHANGE_LIMIT_US] * bench.repeats,
                asked=at_most(1, _EXCHANGE_AIM_US / _EXCHANGE_LIMIT_US),
            )
        )
    return rows


def memory(bench: Bench) -> list[Row]:
    """Peak memory of 1 + 2 workers without the interpreter and its libraries, measured once."""
    found = memory_of_workers(bench.checkpoint(bench.size(MINI)), "bfloat16")
    return [
        Row(
            what=f"peak memory of {name}",
            unit="MB",
            measured=[worker.peak / 1e6],
            bound=[worker.limit / 1e6],
            asked=at_most(1),
        )
        for name, worker in found.items()
    ]


ROWS: dict[str, Callable[[Bench], Sequence[Row]]] = {
    "workers": workers,
    "exchange": exchange,
    "memory": memory,
    "whole": whole,
}
"""Name in ``--rows`` -> function that measures the rows."""
