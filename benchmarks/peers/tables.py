"""The tables of ``benchmarks.peers``: rates with their bounds, and ratios at equal weights."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.checkpoints.ggml_types import BF16, Q4_0, Q8_0, GgmlType
from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.memory_wall.bounds import decode_bound
from benchmarks.report.results import table
from benchmarks.report.timing import Sample, median_of, ratio_of
from cluster.config.model import QuantizeLayers
from workers.quantization.formats import WeightFormat
from workers.quantization.rounding import FORMATS, IntegerCodes

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "local": ("--mode", "local"),
    "1 + 1": ("--num-attention-workers", "1", "--num-expert-workers", "1"),
}
"""Options of ``expertmesh serve``, by the name in the tables."""
VLLM, TRANSFORMERS, LLAMA = "vLLM", "transformers", "llama.cpp"
_RATIOS = (
    ("local", TRANSFORMERS),
    ("local", VLLM),
    ("1 + 1", VLLM),
    ("local", LLAMA),
    ("1 + 1", "local"),
)
"""What is compared: (system, base)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One way to keep weights."""

    dtype: Literal["bfloat16", "float32"]
    """What is computed in; the type of all weights but those that are quantized."""
    quantize: IntegerCodes | None = None
    """Of all products of ours; None: none are."""
    ggml: GgmlType | None = None
    """Of the same matrices in llama.cpp; None: it is not measured."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number in ``dtype``."""
        return {"bfloat16": 2, "float32": 4}[self.dtype]


WEIGHTS: Mapping[str, Weights] = {
    "bfloat16": Weights(dtype="bfloat16", ggml=BF16),
    "float32": Weights(dtype="float32"),
    "int8": Weights(dtype="bfloat16", quantize="int8", ggml=Q8_0),
    "int4": Weights(dtype="bfloat16", quantize="int4", ggml=Q4_0),
}
"""By the names of ``--dtype``."""
PLAIN = tuple(name for name, weights in WEIGHTS.items() if weights.quantize is None)
"""Those that are not quantized."""


@dataclass(frozen=True, order=True, slots=True)
class Row:
    """One system of the tables."""

    system: str
    """Name."""
    weights: str
    """How it keeps them: a name of ``WEIGHTS``."""


Samples = Mapping[Row, Mapping[int, Sequence[Sample]]]
"""By system and batch size, in the order of the repeats."""


@dataclass(slots=True)
class Found:
    """What was measured."""

    samples: dict[Row, dict[int, list[Sample]]] = field(default_factory=dict)
    """See ``Samples``."""
    bandwidth: list[float] = field(default_factory=list)
    """Bytes a second that all cores read, by repeat."""
    absent: dict[str, str] = field(default_factory=dict)
    """Name of a system -> why it was not measured."""


def report(args: argparse.Namespace, model: RandomModel, num_cores: int, found: Found) -> str:
    """The section: what was done, rates with the bound, ratios."""
    head = ["system", *(f"{what} {b}" for b in args.batch for what in ("tokens/s", "decode"))]
    rows = []
    for row, by_batch in sorted(found.samples.items()):
        medians = [median_of(samples) for samples in by_batch.values()]
        cells = [f"{x:.1f}" for m in medians for x in (m.tokens_per_s, m.decode_tokens_per_s)]
        rows.append([f"{row.system}, {row.weights}", *cells])
    for name in args.dtype:
        limits = (bound(model, found, batch, name) for batch in args.batch)
        cells = [cell for limit in limits for cell in ("", f"{limit:.0f}")]
        rows.append([f"bound, {name}", *cells])
    for name, reason in found.absent.items():
        rows.append([f"{name}: not measured, {reason}", *[""] * (len(head) - 1)])
    parts = [_words(args, model, num_cores, found), table(head, rows)]
    ratios = _ratio_rows(args, model, found, PLAIN)
    for name in args.dtype:
        if name not in PLAIN:
            ratios += _ratio_rows(args, model, found, (name,), f", {name}")
    if ratios:
        parts.append(table(["ratio", *map(str, args.batch)], ratios))
    return "\n\n".join(parts)


def bound(model: RandomModel, found: Found, batch: int, name: str) -> float:
    """Tokens a second of a decode step that reads each weight once and does nothing else.

    ``name``: of ``WEIGHTS``, in our formats.
    """
    weights = WEIGHTS[name]
    form = FORMATS[weights.quantize] if weights.quantize else None
    layers: QuantizeLayers = "experts" if form is None else "all"
    bandwidth = statistics.median(found.bandwidth)
    return decode_bound(model, batch, bandwidth, weights.itemsize, form, layers)


def best(samples: Samples, system: str, batch: int, among: Sequence[str] = PLAIN) -> Row | None:
    """A system's fastest weights of some at a batch size; None if none were measured."""
    rows = [row for row in samples if row.system == system and row.weights in among]
    return max(rows, key=lambda r: median_of(samples[r][batch]).tokens_per_s, default=None)


def _ratio_rows(
    args: argparse.Namespace,
    model: RandomModel,
    found: Found,
    among: Sequence[str],
    suffix: str = "",
) -> list[list[str]]:
    """Ratios of tokens/s within a repeat, and our decode rates as shares of the bound.

    Of each system with the fastest weights ``among`` some; ``suffix`` names them.
    """
    rows = []
    for system, base in _RATIOS:
        cells = []
        for batch in args.batch:
            mine, other = (best(found.samples, name, batch, among) for name in (system, base))
            if mine and other:
                ratio = ratio_of(found.samples[mine][batch], found.samples[other][batch])
                cells.append(f"{ratio.total:.2f}")
        if cells:
            rows.append([f"{system} / {base}{suffix}", *cells])
    for system in LAYOUTS:
        cells = []
        for batch in args.batch:
            if mine := best(found.samples, system, batch, among):
                rate = median_of(found.samples[mine][batch]).decode_tokens_per_s
                cells.append(f"{rate / bound(model, found, batch, mine.weights):.2f}")
        if cells:
            rows.append([f"{system}, decode / bound{suffix}", *cells])
    return rows


def _words(args: argparse.Namespace, model: RandomModel, num_cores: int, found: Found) -> str:
    bandwidth = statistics.median(found.bandwidth) / 1e9
    words = (
        f"## Peers\n\nRandom OLMoE: hidden {model.hidden}, {model.layers} layers, {model.experts} "
        f"experts top-{model.top_k}, ffn {model.ffn}, vocabulary {model.vocab}. Prompts of "
        f"{args.input_len} random tokens, {args.output_len} new ones, greedy, end of text ignored; "
        f"{num_cores} cores and as many threads for each system. `local`, `1 + 1` workers and vLLM "
        "stream over HTTP, transformers (`generate`) and llama.cpp run in a process without a "
        "server. `tokens/s` of the batch includes the prefill, `decode` is the rate while all "
        "sequences decode. The bound of the decode rate: the weights of a step, read once at the "
        f"{bandwidth:.1f} GB/s that {num_cores} threads read memory with in the same runs. Medians "
        f"of {args.repeats} runs in turns; ratios are of `tokens/s`, medians of the ratios within "
        "a run, each system in its faster type."
    )
    if quantized := [name for name in args.dtype if name not in PLAIN]:
        words += " " + _words_of_codes(quantized)
    return words


def _words_of_codes(quantized: Sequence[str]) -> str:
    """``quantized``: names of ``WEIGHTS``."""
    parts = []
    for name in quantized:
        weights = WEIGHTS[name]
        assert weights.quantize is not None, "it is not plain"
        assert weights.ggml is not None, "llama.cpp has it"
        mine, other = _bits(FORMATS[weights.quantize]), weights.ggml.bits
        parts.append(f"{name} {mine:g} here and {other:g} in llama.cpp ({weights.ggml.name})")
    return (
        "Bits a number of the matrices of attention, experts and head, with scales: "
        f"{', '.join(parts)}; the embedding stays in bfloat16. The bounds are those of our "
        "formats. Ratios that name a format compare systems in it, the others in bfloat16 and "
        "float32."
    )


def _bits(form: WeightFormat) -> float:
    """Of a number, with its share of a scale."""
    assert form.group is not None, "it has groups"
    return 8 * form.num_bytes((1, form.group)) / form.group
