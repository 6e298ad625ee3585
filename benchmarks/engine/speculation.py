"""What speculative decoding gains where a text repeats itself, and costs where nothing does.

The local engine with drafts and without, both loaded in one process, alternating. The model is a
random one whose attention outputs are zero: its next token follows from the last one alone, so
greedy decoding goes along a chain of tokens. A prompt that has the chain already is copied, and one
with other tokens here and there is copied with corrections, as an edited text is. Every step
computes all that it would with other weights, attention included; tokens of the chain differ, and
so do their experts. Where nothing repeats, tokens are drawn at temperature 1.

A prediction layer is measured with a model whose experts' outputs are zero, too. Then the layer,
which gets the embedding of the newest token, expects what the model will draw: no checkpoint's
layer is right as often, but each step costs what it costs with any.
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
    """What is generated."""

    label: str
    """In tables."""
    batch: int = 1
    """Requests at once."""
    edited_one_in: int = 0
    """One token in so many of the prompt is another than the one generated; 0: none is."""
    repeats: bool = True
    """The prompt has what is generated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is measured."""

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
    """Tokens of a prompt, and as many new ones."""
    repeats: int = 5
    """Runs of each engine."""
    num_threads: int | None = 2
    """Compute threads; None leaves them as they are."""
    patience_s: float = 5.0
    """While others use the machine, longest wait before a run."""


QUICK = Case(
    texts=(Text(label="copy"), Text(label="nothing repeats", batch=2, repeats=False)),
    num_tokens=12,
    repeats=1,
    num_threads=None,
    patience_s=0.0,
)
"""Enough to see that everything runs."""


PREDICTED = replace(Case(), texts=(Text(label="predicted"), Text(label="predicted", batch=4)))
"""What is measured with a prediction layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Numbers of one run."""

    tokens_per_s: float
    """While all requests decode."""
    num_drafted: float = 0.0
    """Tokens of drafts that were run."""
    num_accepted: float = 0.0
    """Those that were accepted."""
    num_steps: float = 0.0
    """Of prompts too."""
    tokens_per_step: float = 1.0
    """Of a sequence that decodes."""
    cpu_s: float = 0.0
    """Processor time of all threads, prompts included."""
    others_cores: float = 0.0
    """CPU cores that other processes used meanwhile."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Runs of one text, in turns."""

    without: list[Run]
    drafts: list[Run]

    @property
    def ratio(self) -> float:
        """With drafts over without, by tokens a second: the median of those within a repeat."""
        pairs = zip(self.drafts, self.without, strict=True)
        return statistics.median(one.tokens_per_s / other.tokens_per_s for one, other in pairs)

    @property
    def cpu_ratio(self) -> float:
        """Without drafts over with, by processor time, likewise."""
        pairs = zip(self.drafts, self.without, strict=True)
        return statistics.median(other.cpu_s / one.cpu_s for one, other in pairs)


def section(quick: bool) -> str:
    """The section of its page."""
    case, model = (QUICK, TINY) if quick else (Case(), MODEL)
    with chain_model(model) as checkpoint:
        found = measure(checkpoint, case)
    return f"{_words(case, model)}\n\n{report(found)}\n\n{prediction_section(quick)}"


def prediction_section(quick: bool) -> str:
    """The part of a prediction layer."""
    case, model = PREDICTED, PREDICTING
    if quick:
        case = replace(QUICK, texts=PREDICTED.texts)
        model = replace(TINY, family=PREDICTING.family, prediction_layers=1)
    with chain_model(model) as checkpoint:
        found = measure(checkpoint, case, SpeculationSection(speculative_method="mtp"))
    words = (
        f"`mtp` with {model.layers} layers of a random GLM-4.5 in bf16, hidden {model.hidden}, "
        f"{model.experts} experts, ffn {model.ffn}, vocabulary {model.vocab}, whose prediction "
        f"layer is always right; prompts and answers of {case.num_tokens} tokens."
    )
    return f"### Prediction layer\n\n{words}\n\n{report(found)}"


@contextmanager
def chain_model(model: RandomModel) -> Iterator[Path]:
    """A random checkpoint without outputs of attention, removed afterwards; with a prediction layer
    without outputs of experts, too, and the layer sees embeddings.
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
    """Runs with drafts and without, of each text."""
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
        for engine in (without, drafts):  # warm: it knows the times of its steps
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
    """Those of a run."""
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
    """So many chains of different tokens."""
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
    """Serve requests together."""
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
    """Of each sequence when its tokens came; the first one comes from the step of its prompt.

    >>> tokens_per_step([[0.1, 0.2, 0.2, 0.2, 0.3], [0.1, 0.2, 0.3]])
    1.5
    """
    num_tokens = sum(len(own) - 1 for own in times)
    return num_tokens / sum(len(set(own)) - 1 for own in times)


def report(found: dict[Text, Pair]) -> str:
    """One row for each text."""
    head = ["text", "batch", "without: tokens/s", "with: tokens/s", "with / without"]
    head += ["processor time: without / with", "drafted", "accepted", "tokens per step"]
    head += ["steps / without", "others"]
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
        "## Speculative decoding\n\nn-gram lookup with its defaults, in one process "
        f"(`--mode local`). {model.layers} layers of a random OLMoE, bf16, hidden {model.hidden}, "
        f"{model.experts} experts, ffn {model.ffn}, vocabulary {model.vocab}. Outputs of attention "
        "are zero, so that a chain of different tokens is generated, and a prompt that has it is "
        f"copied. Prompts and answers of {case.num_tokens} tokens; tokens/s while all requests "
        f"decode. Medians of {case.repeats} runs; ratios are medians of the ratios within a run. "
        "Processor times are those of all threads, prompts included. `drafted`: tokens of drafts "
        "in a run, `accepted`: their share that was right, `tokens per step`: of a sequence that "
        "decodes, `others`: cores that other processes used meanwhile."
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
