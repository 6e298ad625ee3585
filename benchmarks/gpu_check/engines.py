"""Tokens and log-probabilities of engines on the device, compared with an engine on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.gpu_check.device import host_waits
from benchmarks.gpu_check.section import Place, Report
from benchmarks.gpu_check.step_costs import cost_of_steps, steps
from benchmarks.gpu_check.weights import RandomCheckpoint
from benchmarks.harness.both_roles import take_both_roles
from benchmarks.harness.local_engine import Generated, LocalEngine, block_bytes
from benchmarks.harness.prompts import random_prompts
from cluster.config.cluster import EngineSection
from cluster.config.speculation import SpeculationSection
from cluster.launch.model_source import bundled_checkpoint
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import Request, SamplingParams, TokenLogprob

DType = Literal["float32", "bfloat16"]
LIMITS: dict[DType, float] = {"float32": 1e-3, "bfloat16": 2e-2}
"""Of differences of log-probabilities: the largest in float32; the mean in bfloat16, where a router
that chooses another expert makes single ones large, and beside what rounding does on a CPU."""
_TIE = {"float32": 1e-3, "bfloat16": 0.75}
"""The best two tokens are nearer than that: either may come, and ends the comparison. In bfloat16
it is twice the largest difference that rounding makes on a CPU, where that is more: each of the two
may be off by so much."""
_BLOCK = 16
PLAIN = EngineSection(enable_prefix_caching=False, kv_cache_bytes=64 << 20)
_CHUNKS = replace(PLAIN, max_num_batched_tokens=13, max_num_seqs=8)
MAX_MODEL_LEN = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model and the function that opens it."""

    open: Callable[[], Checkpoint]
    """Opens the model, each time with the same weights."""
    prompts: Sequence[Sequence[int]]
    new_tokens: int

    @property
    def params(self) -> SamplingParams:
        """Greedy sampling parameters with all compared values."""
        return SamplingParams(
            max_tokens=self.new_tokens,
            temperature=0.0,
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs=0,
        )

    def engine(
        self,
        dtype: str,
        device: torch.device,
        section: EngineSection,
        speculation: SpeculationSection | None = None,
    ) -> LocalEngine:
        """An engine with torch's kernels, as on a GPU."""
        return LocalEngine(
            self.open(),
            dtype=dtype,
            device=str(device),
            section=section,
            speculation=speculation,
            max_model_len=MAX_MODEL_LEN,
            kernels="torch",
        )


def random_size(place: Place, family: Any, **sizes: Any) -> RandomModel:
    """The size of a random model of a family."""
    model = RandomModel(
        family=family,
        hidden=place.size(256, 64),
        layers=2,
        heads=8,
        experts=16,
        top_k=place.size(4, 2),
        ffn=place.size(128, 32),
        vocab=1024,
        max_positions=512,
    )
    return replace(model, **sizes)


def random_model(place: Place, family: Any, **given: Any) -> Model:
    """A random model of a family or size, whose head makes choices clear; ``given``: see
    ``RandomCheckpoint``."""
    model = family if isinstance(family, RandomModel) else random_size(place, family)
    return Model(
        open=lambda: RandomCheckpoint(model, torch.device("cpu"), head_gain=4.0, **given),
        prompts=_prompts(place, model.vocab),
        new_tokens=place.size(24, 12),
    )


def _prompts(place: Place, vocab: int) -> list[list[int]]:
    lengths = (1, 5, 17) if place.is_tiny else (1, 5, 16, 33, 70, 120, 17, 64)
    return [random_prompts(f"gpu {n}", 1, n, vocab)[0] for n in lengths]


def olmoe(place: Place, report: Report) -> None:
    """OLMoE."""
    compare(place, report, random_model(place, "olmoe"))


def dots1(place: Place, report: Report) -> None:
    """dots.llm1: shared experts and a dense first layer."""
    compare(place, report, random_model(place, "dots1"))


def jetmoe(place: Place, report: Report) -> None:
    """JetMoE: experts in attention, too."""
    compare(place, report, random_model(place, "jetmoe"))


def demo(place: Place, report: Report) -> None:
    """The bundled model, which is trained."""
    compare(place, report, demo_model(place))


def demo_model(place: Place) -> Model:
    """The bundled model."""
    folder = bundled_checkpoint()
    prompts = _prompts(place, Checkpoint(folder).config.vocab_size)
    return Model(open=lambda: Checkpoint(folder), prompts=prompts, new_tokens=place.size(24, 12))


def others(place: Place, report: Report) -> None:
    """Compare the other families in the most different ways."""
    _in_short(place, report, OTHERS)


def latent(place: Place, report: Report) -> None:
    """Compare families with latent attention, which torch computes."""
    _in_short(place, report, LATENT)


def hybrid(place: Place, report: Report) -> None:
    """Compare families with recurrent states, which torch computes."""
    _in_short(place, report, HYBRID)


def _in_short(place: Place, report: Report, families: Sequence[str]) -> None:
    for family in families:
        seen = all_ways(place, report, random_model(place, family), SHORT_WAYS, f"{family} ")
        report.value(f"{family} log-probabilities", seen.found)
    report.say(", ".join(families))


def compare(place: Place, report: Report, model: Model) -> None:
    """Compare all ways through an engine in both dtypes; then measure the host's cost of a step."""
    seen = all_ways(place, report, model, tuple(WAYS))
    report.value("log-probabilities", seen.found)
    with report.part("cost of a step"):
        _cost(place, report, model)
    report.say(seen.words)


def all_ways(
    place: Place, report: Report, model: Model, ways: Sequence[str], words: str = ""
) -> Differences:
    """Ways through an engine, in both types; ``words`` come before what is reported."""
    by_type, seen = on_cpu(report, model, words)
    for dtype, known in by_type.items():
        case = Case(place=place, report=report, model=model, dtype=dtype, known=known, seen=seen)
        for name in ways:
            with report.part(f"{words}{name} {dtype}"):
                WAYS[name](case)
    return seen


def on_cpu(
    report: Report, model: Model, words: str = ""
) -> tuple[Mapping[DType, Sequence[Generated]], Differences]:
    """What engines on a CPU give in each type, and how far bfloat16 is off there."""
    exact = _native(model).generate(model.prompts, model.params)
    rounded, pieces = (
        model.engine("bfloat16", torch.device("cpu"), section).generate(model.prompts, model.params)
        for section in (PLAIN, _CHUNKS)
    )
    seen = differences_on_cpu(report, exact, rounded, words, pieces)
    return {"float32": exact, "bfloat16": rounded}, seen


def differences_on_cpu(
    report: Report,
    exact: Sequence[Generated],
    rounded: Sequence[Generated],
    words: str,
    pieces: Sequence[Generated] = (),
) -> Differences:
    """Of bfloat16 to float32, ``pieces`` of prompts in chunks."""
    off = prompt_differences(rounded, exact)
    most = max(*off, *prompt_differences(pieces, exact[: len(pieces)]))
    seen = Differences(noise=sum(off) / len(off), most=most)
    report.value(f"{words}bfloat16 off from float32 on a CPU", {"mean": seen.noise, "max": most})
    return seen


def _native(model: Model) -> LocalEngine:
    """The engine of a CPU in float32, with its compiled kernels where there are any."""
    return LocalEngine(model.open(), dtype="float32", section=PLAIN, max_model_len=MAX_MODEL_LEN)


def prompt_differences(some: Sequence[Generated], others: Sequence[Generated]) -> list[float]:
    """Differences of the log-probabilities of prompts."""
    return [
        abs(a.logprob - b.logprob)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(one.prompt_logprobs or (), other.prompt_logprobs or (), strict=True)
        if a and b
    ]


class Differences:
    """Differences of all compared log-probabilities."""

    def __init__(self, noise: float = 0.0, most: float = 0.0) -> None:
        self.noise = noise
        """Mean difference of bfloat16 from float32, both on a CPU."""
        self._ties = {**_TIE, "bfloat16": max(_TIE["bfloat16"], 2 * most)}
        self.found: dict[str, dict[str, float]] = {}

    def is_tie(self, dtype: DType, entry: TokenLogprob) -> bool:
        """Whether a token other than the best one is right too."""
        return margin(entry) < self._ties[dtype]

    def add(self, dtype: DType, values: Sequence[float]) -> None:
        mean, most = sum(values) / len(values), max(values)
        known = self.found.setdefault(dtype, {"mean": 0.0, "max": 0.0})
        self.found[dtype] = {"mean": max(mean, known["mean"]), "max": max(most, known["max"])}

    @property
    def words(self) -> str:
        parts = (f"{v['mean']:.1g} to {v['max']:.1g} ({k})" for k, v in self.found.items())
        return "log-probabilities off by (mean to max) " + ", ".join(parts)


def equal(
    report: Report,
    what: str,
    dtype: DType,
    got: Sequence[Generated],
    want: Sequence[Generated],
    seen: Differences,
) -> None:
    """Check tokens and log-probabilities of requests."""
    differences: list[float] = []
    num_compared = 0
    for i, (mine, other) in enumerate(zip(got, want, strict=True)):
        pairs = zip(mine.prompt_logprobs or (), other.prompt_logprobs or (), strict=True)
        differences += [abs(a.logprob - b.logprob) for a, b in pairs if a and b]
        for place, (a, b) in enumerate(zip(mine.logprobs, other.logprobs, strict=True)):
            if a.token_id != b.token_id:
                words = f"{what} {dtype}: token {place} of request {i} is another"
                report.check(seen.is_tie(dtype, b), words)
                break
            differences.append(abs(a.logprob - b.logprob))
            num_compared += 1
    asked = sum(len(other.logprobs) for other in want)
    report.check(num_compared * 2 >= asked, f"{what} {dtype}: {num_compared} of {asked} tokens")
    if not differences:
        return
    seen.add(dtype, differences)
    mean, most = sum(differences) / len(differences), max(differences)
    off = most if dtype == "float32" else mean - seen.noise
    report.check(off <= LIMITS[dtype], f"{what} {dtype}: log-probabilities off by {off:.1e}")


def margin(entry: TokenLogprob) -> float:
    """Difference of log-probability between the best two tokens."""
    (_, first), (_, second) = entry.top[:2]
    return first - second


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model in one dtype, and the results of a CPU for its prompts."""

    place: Place
    report: Report
    model: Model
    dtype: DType
    known: Sequence[Generated]
    seen: Differences

    def engine(self, section: EngineSection) -> LocalEngine:
        """Open an engine on the device."""
        return self.model.engine(self.dtype, self.place.device, section)

    def serve(self, what: str, engine: LocalEngine) -> None:
        """Run all requests at the same time."""
        got = engine.generate(self.model.prompts, self.model.params)
        equal(self.report, what, self.dtype, got, self.known, self.seen)


def _plain(case: Case) -> None:
    """Run all requests at the same time."""
    case.serve("together", case.engine(PLAIN))


def _both_roles(case: Case) -> None:
    """Send rows to the experts as to the experts of another worker."""
    engine = case.engine(PLAIN)
    take_both_roles(engine)
    case.serve("with both roles", engine)


def _chunked(case: Case) -> None:
    """Run prompts in chunks beside decode rows."""
    case.serve("in chunks", case.engine(_CHUNKS))


def _preempted(case: Case) -> None:
    """Run each request twice, with a cache that holds little more than the longest one."""
    model, report, dtype = case.model, case.report, case.dtype
    config = model.open().config
    lengths = [len(prompt) + model.new_tokens for prompt in model.prompts]
    blocks = -(-max(lengths) // 4) + 1
    each = block_bytes(config, 4, getattr(torch, dtype))
    section = replace(PLAIN, block_size_tokens=4, kv_cache_bytes=blocks * each)
    engine = case.engine(section)
    got = engine.generate([*model.prompts, *model.prompts], model.params)
    equal(report, "preempted", dtype, got, [*case.known, *case.known], case.seen)
    count = engine.engine.stats()["num_preemptions_total"]
    report.check(count > 0, f"preempted {dtype}: nothing was")
    engine.engine.check_integrity()


def _cached(case: Case) -> None:
    """Run requests twice; prompts are cached the second time, except scored prompts."""
    model, report, dtype = case.model, case.report, case.dtype
    engine = case.engine(replace(PLAIN, enable_prefix_caching=True))
    engine.generate(model.prompts, model.params)
    before = engine.engine.stats()["prefix_cache_hits_total"]
    unscored = SamplingParams(
        max_tokens=model.new_tokens, temperature=0.0, ignore_eos=True, logprobs=2
    )
    got = engine.generate(model.prompts, unscored)
    plain = [replace(other, prompt_logprobs=None) for other in case.known]
    equal(report, "from the prefix cache", dtype, got, plain, case.seen)
    hits = engine.engine.stats()["prefix_cache_hits_total"] - before
    wanted = sum((len(prompt) - 1) // _BLOCK * _BLOCK for prompt in model.prompts)
    report.check(hits >= wanted, f"prefix cache {dtype}: {hits:.0f} of {wanted} tokens found")


WAYS = {
    "together": _plain,
    "both roles": _both_roles,
    "chunks": _chunked,
    "preemption": _preempted,
    "prefix": _cached,
}
"""Name of a way through an engine -> function that runs it."""
SHORT_WAYS = ("together", "both roles", "chunks")
OTHERS = (
    *("qwen3_moe", "glm4_moe", "mixtral", "minimax_m2", "ernie4_5_moe", "gpt_oss", "flex_olmo"),
)
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
HYBRID = ("qwen3_next", "qwen3_5_moe_text")
"""Families that ``others``, ``latent`` and ``hybrid`` compare."""


def _cost(place: Place, report: Report, model: Model) -> None:
    """Measure the waits of the host and the kernels of a step."""
    engine = model.engine("bfloat16", place.device, PLAIN)
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(model.prompts):
        engine.add_request(Request(request_id=f"r{i}", prompt=tuple(prompt), params=params))
    with host_waits(place.device) as waits:
        engine.step()
    report.value("prefill step", {"waits": waits.total(), "places": dict(waits)})
    steps(engine, 3)
    report.value("decode step", cost_of_steps(engine, place.device, 4))
