"""Tokens a second of transformers, of one process, and of one attention and one expert worker.

The three systems have two compute threads each: (a) transformers, (b) the engine of expertmesh in
one process, (c) two workers with one thread each. All stay loaded and take turns, so that other
load on the machine affects them alike.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import random_checkpoint
from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.harness.prompts import random_prompts
from benchmarks.harness.systems import System, running
from benchmarks.report.quiet import QUIET_CORES, CpuClock, wait_until_quiet
from benchmarks.report.results import table
from benchmarks.report.timing import Sample, median_of, ratio_of, sample_of
from cluster.launch.model_source import bundled_checkpoint

logger = logging.getLogger(__name__)

LETTERS = {"transformers": "a", "local": "b", "ray": "c"}
"""Short names in the tables."""
LABELS = {
    "transformers": "(a) transformers `generate`",
    "local": "(b) local engine",
    "ray": "(c) 1 + 1 workers",
}
"""Labels in the tables."""
_PAIRS = (("local", "transformers"), ("ray", "local"))
"""Pairs of systems in the tables of ratios: (system, base)."""
_WARM_UP_TOKENS = 4
Results = Mapping[int, Mapping[str, Sequence[Sample]]]
"""Batch size -> system -> samples in the order of the repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    batches: tuple[int, ...] = (1, 8, 32)
    """Numbers of sequences."""
    prompt_tokens: int = 128
    """Length of each prompt."""
    new_tokens: int = 64
    """Output tokens of each sequence."""
    repeats: int = 3
    """Runs of every system at every batch size."""
    systems: tuple[str, ...] = ("transformers", "local", "ray")
    """Names in ``child.SYSTEMS``."""
    patience_s: float = 10.0
    """Longest time to wait for, and repeat a run for, other processes to be quiet."""


QUICK = Case(batches=(2,), prompt_tokens=8, new_tokens=4, repeats=1, patience_s=0.0)
"""Enough to see that everything runs."""
TINY = random_checkpoint.TINY
"""The random model of a quick run."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = QUICK if quick else Case()
    return _words(case) + "\n\n" + "\n\n".join(_reports(case, TINY if quick else RandomModel()))


def _reports(case: Case, model: RandomModel) -> Iterator[str]:
    yield report("Bundled checkpoint", case, measure(bundled_checkpoint(), case))
    with random_model(model) as checkpoint:
        title = (
            f"Random OLMoE: hidden {model.hidden}, {model.layers} layers, {model.experts} experts, "
            f"ffn {model.ffn}, vocabulary {model.vocab}, bf16"
        )
        yield report(title, case, measure(checkpoint, case))


@contextmanager
def random_model(model: RandomModel) -> Iterator[Path]:
    """Yield a random checkpoint and remove it afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield random_checkpoint.write(model, Path(folder) / "checkpoint")


def measure(checkpoint: Path, case: Case) -> Results:
    """Run all systems in turns; without transformers, (a) is not measured."""
    names = [n for n in case.systems if n != "transformers" or importlib.util.find_spec(n)]
    found: dict[int, dict[str, list[Sample]]] = {b: {n: [] for n in names} for b in case.batches}
    with running(names, checkpoint) as systems:
        for batch in case.batches:
            for name in names:
                systems[name].generate(_prompts(case, batch, seed=0), _WARM_UP_TOKENS)
        for repeat in range(case.repeats):
            for batch in case.batches:
                for name in names:
                    sample = _run(systems[name], case, batch, seed=repeat + 1)
                    found[batch][name].append(sample)
                    logger.info(
                        "run %d, batch %d, %s: %.1f tokens/s, ITL %.2f ms, others %.1f cores",
                        repeat + 1,
                        batch,
                        LABELS.get(name, name),
                        sample.tokens_per_s,
                        sample.itl_ms,
                        sample.others_cores,
                    )
    return found


def _run(system: System, case: Case, batch: int, seed: int) -> Sample:
    """Return one run, repeated within the time limit if other load disturbs it."""
    prompts = _prompts(case, batch, seed)
    deadline = time.monotonic() + case.patience_s
    while True:
        wait_until_quiet(deadline)
        before = CpuClock.now()
        times = system.generate(prompts, case.new_tokens)
        others = before.others(CpuClock.now())
        if others < QUIET_CORES or time.monotonic() > deadline:
            return sample_of(times, others)


def _prompts(case: Case, batch: int, seed: int) -> list[list[int]]:
    return random_prompts(f"{seed} {batch}", batch, case.prompt_tokens)


def report(title: str, case: Case, results: Results) -> str:
    """Return a heading, a table of the results and a table of ratios."""
    head = ["batch, system", "tokens/s", "prefill, s", "decode tokens/s", "ITL, ms", "other load"]
    rows = []
    for batch, samples in results.items():
        for name, mine in samples.items():
            rows.append([f"{batch}, {LABELS[name]}", *_cells(median_of(mine))])
    pairs = [p for p in _PAIRS if all(n in s for n in p for s in results.values())]
    ratio_head = ["batch"]
    for name, base in pairs:
        both = f"{LETTERS[name]} / {LETTERS[base]}"
        ratio_head += [f"{both}, tokens/s", f"{both}, decode tokens/s"]
    ratio_rows = []
    for batch, samples in results.items():
        ratios = [ratio_of(samples[name], samples[base]) for name, base in pairs]
        ratio_rows.append([str(batch), *[f"{x:.2f}" for r in ratios for x in (r.total, r.decode)]])
    return f"### {title}\n\n{table(head, rows)}\n\n{table(ratio_head, ratio_rows)}"


def _cells(sample: Sample) -> list[str]:
    return [
        f"{sample.tokens_per_s:.1f}",
        f"{sample.prefill_s:.3f}",
        f"{sample.decode_tokens_per_s:.1f}",
        f"{sample.itl_ms:.2f}",
        f"{sample.others_cores:.1f}",
    ]


def _words(case: Case) -> str:
    return (
        f"## Serving\n\nPrompts have {case.prompt_tokens} random tokens; {case.new_tokens} new "
        "tokens are sampled greedily. (a) and (b) are one process with two compute threads, (c) is "
        "two workers with one thread each, measured at the engine stream. Tokens/s include the "
        "prefill. Decode tokens/s and ITL (inter-token latency, median) count while all sequences "
        "decode. Other load: CPU cores that other processes used. Medians of "
        f"{case.repeats} runs; ratios are medians of the ratios within a run."
    )
