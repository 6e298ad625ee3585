"""Engines with drafts on the device, against an engine without them on a CPU.

Every guess is run, whether it pays or not: what is compared are rows of drafts that are kept, and
such that are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from unittest.mock import patch

from benchmarks.gpu_check.engines import (
    PLAIN,
    Differences,
    DType,
    Model,
    demo_model,
    equal,
    on_cpu,
    random_model,
    random_size,
)
from benchmarks.gpu_check.section import Place, Report
from benchmarks.harness.local_engine import Generated
from cluster.config.speculation import SpeculationSection
from workers.requests.request import SamplingParams
from workers.speculation.acceptance import Acceptance

NGRAM = SpeculationSection(speculative_method="ngram", num_speculative_tokens=4, ngram_min=1)
MTP = SpeculationSection(speculative_method="mtp")
_FEW_TOKENS = 64
"""Of a vocabulary: most of them have stood in the text before."""
_CHAIN = ("o_proj.weight",)
"""Zero: what comes next depends on the last token alone, so a text repeats itself."""
_EXPECTED = (*_CHAIN, "down_proj.weight", "eh_proj.weight")
"""Zero, but for the last: a prediction layer expects what the model draws."""
_SAMPLED = SamplingParams(max_tokens=16, temperature=0.8, top_k=20, seed=7, ignore_eos=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model without drafts and with them."""

    known: Model
    """As it is compared with."""
    drafting: Model
    """The same weights, with a prediction layer where one is used."""
    speculation: SpeculationSection
    accepts: bool = False
    """Some drafts must be kept."""


def cases(place: Place) -> dict[str, Case]:
    """By name."""
    size = random_size(place, "olmoe", vocab=_FEW_TOKENS)
    plain, chain = random_model(place, size), random_model(place, size, zeros=_CHAIN)
    found = {
        "n-gram": Case(known=plain, drafting=plain, speculation=NGRAM),
        "n-gram, kept": Case(known=chain, drafting=chain, speculation=NGRAM, accepts=True),
        "n-gram, demo": _of_demo(place),
        "MTP": _predicting(place, "glm4_moe", ()),
        "MTP, kept": _predicting(place, "glm4_moe", _EXPECTED),
        "MTP of latent attention": _predicting(place, "deepseek_v3", ()),
    }
    return {name: _repeating(case) for name, case in found.items()}


def _of_demo(place: Place) -> Case:
    model = demo_model(place)
    return Case(known=model, drafting=model, speculation=NGRAM)


def _predicting(place: Place, family: str, zeros: tuple[str, ...]) -> Case:
    size = random_size(place, family)
    return Case(
        known=random_model(place, size, zeros=zeros),
        drafting=random_model(place, replace(size, prediction_layers=1), zeros=zeros),
        speculation=MTP,
        accepts=bool(zeros),
    )


def _repeating(case: Case) -> Case:
    """With prompts that repeat themselves."""
    prompts = [list(prompt[:24]) * 3 for prompt in case.known.prompts[:5]]
    known, drafting = (replace(own, prompts=prompts) for own in (case.known, case.drafting))
    return replace(case, known=known, drafting=drafting)


def run(place: Place, report: Report) -> None:
    """Both types, captured steps and such that are not."""
    kept: list[str] = []
    with patch.object(Acceptance, "num_worthwhile", lambda self, price, most: most):
        for name, case in cases(place).items():
            with report.part(name):
                kept.append(f"{_check(place, report, name, case):.0%} ({name})")
    report.say(f"kept of the drafts {', '.join(kept)}")


def _check(place: Place, report: Report, name: str, case: Case) -> float:
    """Returns the share of drafts that were kept."""
    by_type, seen = on_cpu(report, case.known, f"{name} ")
    num_drafts = num_kept = 0.0
    for dtype, known in by_type.items():
        for is_eager in (False, True):
            what = f"{name}{' eager' if is_eager else ''}"
            counts = _compare(place, report, what, case, dtype, known, seen, is_eager)
            num_drafts, num_kept = num_drafts + counts[0], num_kept + counts[1]
    with report.part(f"{name} sampled"):
        _sampled(place, report, name, case)
    report.check(num_drafts > 0, f"{name}: no draft was run")
    report.check(num_kept > 0 or not case.accepts, f"{name}: no draft was kept")
    report.value(f"{name} log-probabilities", seen.found)
    return num_kept / max(num_drafts, 1.0)


def _compare(
    place: Place,
    report: Report,
    what: str,
    case: Case,
    dtype: DType,
    known: Sequence[Generated],
    seen: Differences,
    is_eager: bool,
) -> tuple[float, float]:
    """Greedy tokens and their log-probabilities; returns how many drafts there were, and kept."""
    section = replace(PLAIN, enforce_eager=is_eager)
    engine = case.drafting.engine(dtype, place.device, section, case.speculation)
    got = engine.generate(case.drafting.prompts, case.drafting.params)
    equal(report, what, dtype, got, known, seen)
    engine.engine.check_integrity()
    stats = engine.engine.stats()
    names = ("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")
    counts = [stats[name] for name in names]
    report.value(f"{what} {dtype} drafts", {"run": counts[0], "kept": counts[1]})
    return counts[0], counts[1]


def _sampled(place: Place, report: Report, name: str, case: Case) -> None:
    """Seeded draws with drafts are those without, on the same device in float32."""
    engines = (
        case.known.engine("float32", place.device, PLAIN),
        case.drafting.engine("float32", place.device, PLAIN, case.speculation),
    )
    without, drafts = (engine.generate(case.known.prompts, _SAMPLED) for engine in engines)
    pairs = list(zip(without, drafts, strict=True))
    num_equal = sum(one.token_ids == other.token_ids for one, other in pairs)
    report.value(f"{name} equal samples", f"{num_equal} of {len(pairs)}")
    # A draw may fall on the edge between two tokens.
    report.check(num_equal >= len(pairs) - 1, f"{name}: {num_equal} of {len(pairs)} draws equal")
