"""CPU time of a step outside the model: ``python -m benchmarks.engine.step_cost``.

The engine serves a model whose forward pass takes no time and whose logits are random, so that only
the work around the kernels is left. The times are CPU times of the step's thread, which other load
on the machine affects little, in the shortest of several runs.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.report.results import table
from cluster.config.cluster import EngineSection
from workers.dispatch.local import LocalDispatcher
from workers.engine.engine import Engine
from workers.model.config import ModelConfig
from workers.model.layers import LayerSteps, ModelInputs
from workers.native.thread_team import start_kernels
from workers.process.step_messages import step_messages
from workers.requests.request import Request, SamplingParams, TokenOutput
from workers.requests.step_header import Grant, Grants, StepHeader
from workers.requests.wire import FROM_ENGINE

PARTS = ("schedule", "batch", "sampling", "commit", "poll", "encode", "rest")
"""Columns of the table; ``rest`` is the time of a step outside the other parts."""
_STEPS_PER_RUN = 16
"""Steps of a run, in which each sequence allocates one new block."""
_WARM_UP_RUNS = 1
_HIDDEN = 64

GREEDY = SamplingParams(max_tokens=3_000, temperature=0.0, ignore_eos=True)
RANDOM = replace(GREEDY, temperature=0.8)
KINDS = {
    "greedy": GREEDY,
    "random": RANDOM,
    "random, top_k 50, top_p 0.95": replace(RANDOM, top_k=50, top_p=0.95),
    "greedy, penalties": replace(GREEDY, repetition_penalty=1.1, frequency_penalty=0.1),
}
"""Label in the table -> sampling parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A batch of requests that decode."""

    kind: str
    """One of ``KINDS``."""
    batch: int
    """Number of requests."""
    runs: int = 6
    """Runs of 16 steps each."""
    vocab_size: int = 50304
    """Number of logits of a row."""
    prompt_tokens: int = 128
    """Tokens of the shortest prompt; other prompts have up to 15 more."""


CASES = (
    *(Case(kind="greedy", batch=batch) for batch in (1, 8, 32, 64, 256)),
    *(Case(kind=kind, batch=32) for kind in KINDS if kind != "greedy"),
)
QUICK = Case(kind="greedy", batch=3, runs=1, vocab_size=256, prompt_tokens=8)
"""Enough to see that everything runs."""


class FreeModel:
    """Replaces ``AttentionModel``; returns random logits without computing."""

    dtype = torch.bfloat16
    device = torch.device("cpu")
    is_native = True  # what is read is prepared as for kernels
    layers = ()

    def __init__(self, batch: int, vocab_size: int) -> None:
        draw = torch.Generator().manual_seed(1)
        self._logits = torch.randn(batch, vocab_size, generator=draw).to(self.dtype)
        self._hidden = torch.zeros(batch, _HIDDEN, dtype=self.dtype)

    def forward(self, inputs: ModelInputs, caches: object) -> LayerSteps:
        """Final hidden states [T, H] without any exchange."""
        yield from ()
        num_rows = len(inputs.token_ids)
        if num_rows <= len(self._hidden):
            return self._hidden[:num_rows]
        return torch.zeros(num_rows, _HIDDEN, dtype=self.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """[rows, H] -> [rows, V]."""
        return self._logits[: len(hidden)]


class _Clock:
    """CPU time of this thread in the calls of each part, without nested calls of other parts."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        self._inner = [0]

    def follow(self, owner: object, method: str, part: str) -> None:
        """Count the calls of a method for a part."""
        call: Callable[..., Any] = getattr(owner, method)

        @wraps(call)
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time_ns()
            self._inner.append(0)
            try:
                return call(*arguments, **named)
            finally:
                took = time.thread_time_ns() - began
                self.ns[part] += took - self._inner.pop()
                self._inner[-1] += took

        setattr(owner, method, run)


class _Loop:
    """The loop of a worker around its engine, with one gateway."""

    def __init__(self, case: Case) -> None:
        section = EngineSection(
            kv_cache_bytes=256 << 20,
            max_num_seqs=case.batch,
            max_num_batched_tokens=max(case.batch, 512),
            max_waiting=max(case.batch, 1024),
        )
        model: Any = FreeModel(case.batch, case.vocab_size)
        self._engine = Engine(
            model=model,
            config=_config(case),
            banks=(),
            dispatcher=LocalDispatcher((), ()),
            section=section,
            team=start_kernels(1).team,
        )
        self._owners: dict[str, str] = {}
        self._num_steps = 0
        for number in range(case.batch):
            name = f"cmpl-{number:032x}"
            tokens = range(case.prompt_tokens + number % section.block_size_tokens)
            prompt = tuple((number * 7919 + place) % case.vocab_size for place in tokens)
            request = Request(
                request_id=name, prompt=prompt, params=KINDS[case.kind], deadline_ms=3_600_000
            )
            self._engine.add_request(request)
            self._owners[name] = "gateway#0"
        while self._engine.rows_wanted().prefill_rows:
            self.step()

    def follow(self, clock: _Clock) -> None:
        """Start to count the parts of the steps."""
        engine: Any = self._engine
        clock.follow(engine, "rows_wanted", "schedule")
        clock.follow(engine._scheduler, "plan", "schedule")
        clock.follow(engine.runner, "run", "batch")
        clock.follow(engine._step_sampler, "sample", "sampling")
        clock.follow(engine.steps, "_commit", "commit")
        clock.follow(engine, "poll", "poll")
        clock.follow(self, "_send", "encode")
        clock.follow(self, "step", "rest")

    def step(self) -> None:
        """Grant the rows that the engine can run, run the step and encode the outputs."""
        wanted = self._engine.rows_wanted()
        self._num_steps += 1
        grant = Grant(decode_rows=wanted.decode_rows, prefill_rows=wanted.prefill_rows)
        header = StepHeader(
            generation=1,
            step=self._num_steps,
            epoch=1,
            oldest_epoch=1,
            grants=Grants.of({0: grant}),
        )
        self._send(self._engine.step(header))

    def _send(self, outputs: list[TokenOutput]) -> None:
        for _, message in step_messages(outputs, self._owners):
            FROM_ENGINE.encode(message)


def measure(case: Case) -> dict[str, float]:
    """Return the microseconds of a step in each part."""
    torch.set_num_threads(1)  # the work of other threads would not be counted
    loop, clock = _Loop(case), _Clock()
    loop.follow(clock)
    best: dict[str, float] = {}
    for number in range(_WARM_UP_RUNS + case.runs):
        clock.ns.clear()
        for _ in range(_STEPS_PER_RUN):
            loop.step()
        found = {part: clock.ns[part] / _STEPS_PER_RUN / 1e3 for part in PARTS}
        if number >= _WARM_UP_RUNS and (not best or sum(found.values()) < sum(best.values())):
            best = found
    return best


def _config(case: Case) -> ModelConfig:
    rope: Any = SimpleNamespace(rope_type="default", factor=1.0)
    return ModelConfig(
        model_type="free",
        vocab_size=case.vocab_size,
        hidden_size=_HIDDEN,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=_HIDDEN,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        eos_token_ids=(),
        dtype="bfloat16",
        rope=rope,
    )


def section(quick: bool) -> str:
    """Return the Markdown section."""
    cases = (QUICK,) if quick else CASES
    rows = []
    for case in cases:
        found = measure(case)
        cells = [f"{found[part]:.0f}" for part in PARTS]
        rows.append([f"{case.kind}, {case.batch}", *cells, f"{sum(found.values()):.0f}"])
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    return (
        f"## A step outside the model\n\n{about} Values are microseconds of a step; prompts have "
        f"{cases[0].prompt_tokens} to {cases[0].prompt_tokens + 15} tokens.\n\n"
        f"{table(['sampling, batch', *PARTS, 'whole step'], rows)}"
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
