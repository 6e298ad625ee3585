"""Speed of decoding with and without drafts, for texts that repeat tokens and texts that do not.

Two local engines in one process, one with drafts and one without, run in turns. The model is
random, but its attention outputs are zero, so that the next token depends on the last token only
and greedy decoding follows a fixed chain of tokens. If the prompt contains this chain, the output
copies the prompt; if some tokens of the prompt are replaced, the output is an edited copy. Steps
compute as much as with other weights. For text without repetition, tokens are sampled at
temperature 1.

The prediction layer is measured with a model whose experts' outputs are zero too, so that its
predictions are always right. Layers of real checkpoints are right less often, but a step costs the
same.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import random_checkpoint
from benchmarks.checkpoints.random_checkpoint import TINY, RandomModel
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.report.quiet import CpuClock, wait_until_quiet
from benchmarks.report.results import table
from benchmarks.report.timing import decode_interval_of
from cluster.config.cluster import EngineSection
from cluster.config.speculation import SpeculationSection
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import Request, SamplingParams

logger = logging.getLogger(__name__)

MODEL = RandomModel(hidden=2048, layers=4, heads=16, ffn=1024)
"""Four layers of OLMoE-1B-7B in full width."""


PREDICTING = RandomModel(
    family="glm4_moe", hidden=1024, layers=12, heads=16, ffn=512, prediction_layers=1
)
"""A small GLM-4.5 with a prediction layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Kind of generated text."""

    label: str
    """Label in the table."""
    batch: int = 1
    """Requests that run at the same time."""
    edited_one_in: int = 0
    """One of this many prompt tokens is replaced; 0 if no token is replaced."""
    repeats: bool = True
    """Whether the output copies the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    texts: tuple[Text, ...] = (
        Text(label="copy"),
        Text(label="copy, 1 token in 16 edited", edited_one_in=16),
        Text(label="copy, 1 token in 4 edited", edited_one_in=4),
        Text(label="nothing repeats", repeats=False),
        Text(label="copy", batch=4),
        Text(label="copy, 1 token in 16 edited", batch=16, edited_one_in=16),
        Text(label="nothing repeats", batch=16, repeats=False),
    )
    num_tokens: int = 128
    """Number of prompt tokens, and of new tokens."""
    repeats: int = 5
    """Runs of each engine."""
    num_threads: int | None = 2
    """Compute threads; None keeps the default."""
    patience_s: float = 5.0
    """Longest wait before a run for other processes to be quiet."""


QUICK = Case(
    texts=(Text(label="copy"), Text(label="nothing repeats", batch=2, repeats=False)),
    num_tokens=12,
    repeats=1,
    num_threads=None,
    patience_s=0.0,
)
"""Enough to see that everything runs."""


PREDICTED = replace(Case(), texts=(Text(label="predicted"), Text(label="predicted", batch=4)))
"""Sizes of the measurement of a prediction layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Results of one run."""

    tokens_per_s: float
    """Tokens a second while all requests decode."""
    num_drafted: float = 0.0
    """Number of draft tokens that were verified."""
    num_accepted: float = 0.0
    """Number of accepted draft tokens."""
    num_steps: float = 0.0
    """Number of steps, prefills included."""
    tokens_per_step: float = 1.0
    """Tokens of a decoding sequence in a step."""
    cpu_s: float = 0.0
    """CPU time of all threads, prefills included."""
    others_cores: float = 0.0
    """CPU cores that other processes used during the run."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Runs of one text without and with drafts."""

    without: list[Run]
    drafts: list[Run]

    @property
    def ratio(self) -> float:
        """Median ratio, within a repeat, of tokens a second with drafts to those without."""
        pairs = zip(self.drafts, self.without, strict=True)
        return statistics.median(one.tokens_per_s / other.tokens_per_s for one, other in pairs)

    @property
    def cpu_ratio(self) -> float:
        """Median ratio, within a repeat, of CPU time without drafts to CPU time with drafts."""
        pairs = zip(self.drafts, self.without, strict=True)
        return statistics.median(other.cpu_s / one.cpu_s for one, other in pairs)


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case, model = (QUICK, TINY) if quick else (Case(), MODEL)
    with chain_model(model) as checkpoint:
        found = measure(checkpoint, case)
    return f"{_words(case, model)}\n\n{report(found)}\n\n{prediction_section(quick)}"


def prediction_section(quick: bool) -> str:
    """Return the part of the section for a prediction layer."""
    case, model = PREDICTED, PREDICTING
    if quick:
        case = replace(QUICK, texts=PREDICTED.texts)
        model = replace(TINY, family=PREDICTING.family, prediction_layers=1)
    with chain_model(model) as checkpoint:
        found = measure(checkpoint, case, SpeculationSection(speculative_method="mtp"))
    words = (
        f"`--speculative-method mtp` with {model.layers} layers of a random GLM-4.5 in bfloat16, "
        f"hidden {model.hidden}, {model.experts} experts, ffn {model.ffn}, vocabulary "
        f"{model.vocab}. The weights are such that the prediction layer is always right. Prompts "
        f"and outputs have {case.num_tokens} tokens."
    )
    return f"### Prediction layer\n\n{words}\n\n{report(found)}"


@contextmanager
def chain_model(model: RandomModel) -> Iterator[Path]:
    """Yield a random checkpoint whose attention outputs are zero, and remove it afterwards. With a
    prediction layer, the experts' outputs are zero too, and the layer gets the embeddings.
    """
    zeros = ("o_proj.weight", *(("down_proj.weight",) if model.prediction_layers else ()))
    with tempfile.TemporaryDirectory() as folder:
        path = random_checkpoint.write(model, Path(folder) / "checkpoint")
        for shard in path.glob("*.safetensors"):
            tensors = load_file(shard)
            for name, tensor in tensors.items():
                if name.endswith((*zeros, "eh_proj.weight")):
                    tensor.zero_()
                if name.endswith("eh_proj.weight"):
                    tensor.fill_diagonal_(1.0)
            save_file(tensors, shard, metadata={"format": "pt"})
        yield path


NGRAM = SpeculationSection(speculative_method="ngram")


def measure(
    checkpoint: Path, case: Case, speculation: SpeculationSection = NGRAM
) -> dict[Text, Pair]:
    """Measure all texts with and without drafts."""
    without, drafts = (
        LocalEngine(
            Checkpoint(checkpoint, has_predictor=section.has_predictor),
            dtype="bfloat16",
            section=EngineSection(enable_prefix_caching=False),
            speculation=section,
            num_threads=case.num_threads,
        )
        for section in (SpeculationSection(), speculation)
    )
    found = {text: Pair([], []) for text in case.texts}
    chains = chains_of(without, max(text.batch for text in case.texts), case.num_tokens)
    numbers = itertools.count()
    for text, pair in found.items():
        for engine in (without, drafts):  # warm up: the engine learns the times of its steps
            run_once(engine, requests(chains, text, next(numbers)))
        for _ in range(case.repeats):
            asked = requests(chains, text, next(numbers))
            for engine, runs in ((without, pair.without), (drafts, pair.drafts)):
                wait_until_quiet(time.monotonic() + case.patience_s)
                before = CpuClock.now()
                run = run_once(engine, asked)
                runs.append(replace(run, others_cores=before.others(CpuClock.now())))
        logger.info("%s, batch %d: %.2f", text.label, text.batch, pair.ratio)
    return found


def requests(chains: Sequence[Sequence[int]], text: Text, number: int) -> list[Request]:
    """Return the requests of a run."""
    length = len(chains[0])
    greedy = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
    found = []
    for place, chain in enumerate(chains[: text.batch]):
        prompt, params = [*chain, chain[0]], greedy
        if text.edited_one_in:
            for edited in range(text.edited_one_in // 2, length, text.edited_one_in):
                prompt[edited] = 1
        if not text.repeats:
            params = structs.replace(greedy, temperature=1.0, seed=64 * number + place)
        found.append(Request(request_id=f"{number}-{place}", prompt=tuple(prompt), params=params))
    return found


def chains_of(engine: LocalEngine, count: int, num_tokens: int) -> list[tuple[int, ...]]:
    """Return ``count`` chains of ``num_tokens`` different tokens."""
    params = SamplingParams(max_tokens=num_tokens - 1, temperature=0.0, ignore_eos=True)
    found: list[tuple[int, ...]] = []
    for begin in itertools.count(3, count):
        firsts = range(begin, begin + count)
        results = engine.generate([(first,) for first in firsts], params)
        chains = [(f, *result.token_ids) for f, result in zip(firsts, results, strict=True)]
        found += [chain for chain in chains if len(set(chain)) == num_tokens]
        if len(found) >= count:
            return found[:count]
    raise AssertionError("unreachable")


def run_once(engine: LocalEngine, asked: Sequence[Request]) -> Run:
    """Serve requests at the same time."""
    before = engine.engine.stats()
    for request in asked:
        engine.add_request(request)
    times: dict[str, list[float]] = {request.request_id: [] for request in asked}
    begin, cpu_begin = time.perf_counter(), time.process_time()
    while engine.engine.has_work:
        outputs = engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            times[output.request_id] += [now] * len(output.token_ids)
    cpu_s = time.process_time() - cpu_begin
    after = engine.engine.stats()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    rate = decode_interval_of(list(times.values())).tokens_per_s
    assert rate is not None, "something was decoded"
    return Run(
        tokens_per_s=rate,
        num_drafted=grown("spec_decode_num_draft_tokens_total"),
        num_accepted=grown("spec_decode_num_accepted_tokens_total"),
        num_steps=grown("steps_total"),
        tokens_per_step=tokens_per_step(list(times.values())),
        cpu_s=cpu_s,
    )


def tokens_per_step(times: Sequence[Sequence[float]]) -> float:
    """Mean tokens of a sequence in a decode step, from the times of its tokens. The first token
    of a sequence belongs to its prefill.

    >>> tokens_per_step([[0.1, 0.2, 0.2, 0.2, 0.3], [0.1, 0.2, 0.3]])
    1.5
    """
    num_tokens = sum(len(own) - 1 for own in times)
    return num_tokens / sum(len(set(own)) - 1 for own in times)


def report(found: dict[Text, Pair]) -> str:
    """Return the table with a row for each text."""
    head = ["text", "batch", "tokens/s without drafts", "tokens/s with drafts", "speed-up"]
    head += ["CPU time, without / with", "draft tokens", "accepted", "tokens in a step"]
    head += ["steps, with / without", "other load"]
    return table(head, [_row(text, pair) for text, pair in found.items()])


def _row(text: Text, pair: Pair) -> list[str]:
    drafted = sum(run.num_drafted for run in pair.drafts)
    accepted = sum(run.num_accepted for run in pair.drafts)
    steps = [sum(run.num_steps for run in runs) for runs in (pair.drafts, pair.without)]
    others = statistics.median(run.others_cores for run in (*pair.without, *pair.drafts))
    rates = [
        statistics.median(run.tokens_per_s for run in runs) for runs in (pair.without, pair.drafts)
    ]
    return [
        *(text.label, str(text.batch)),
        *(f"{rate:.1f}" for rate in rates),
        *(f"{pair.ratio:.2f}", f"{pair.cpu_ratio:.2f}"),
        f"{drafted / len(pair.drafts):.0f}",
        f"{accepted / drafted:.0%}" if drafted else "",
        f"{statistics.fmean(run.tokens_per_step for run in pair.drafts):.2f}",
        *(f"{steps[0] / steps[1]:.2f}", f"{others:.1f}"),
    ]


def _words(case: Case, model: RandomModel) -> str:
    return (
        "## Speculative decoding\n\n`--speculative-method ngram` with its defaults, in one process "
        f"(`--mode local`). The model has {model.layers} layers of a random OLMoE in bfloat16, "
        f"hidden {model.hidden}, {model.experts} experts, ffn {model.ffn}, vocabulary "
        f"{model.vocab}. Its weights are such that the output copies the prompt, or copies it with "
        f"changed tokens. Prompts and outputs have {case.num_tokens} tokens; tokens/s count while "
        f"all requests decode. Values are medians of {case.repeats} runs; ratios are medians of "
        "the ratios within a run. CPU time counts all threads, prefills included. *without / "
        "with* and *with / without* are ratios. *draft tokens* is the number of draft tokens in "
        "one run, *tokens in a step* the mean number of tokens that a step with drafts gives a "
        "sequence, and *other load* the number of CPU cores that other processes used."
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
