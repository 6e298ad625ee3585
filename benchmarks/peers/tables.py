"""Tables of ``benchmarks.peers``: rates with their bounds, and ratios with equal weights."""

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
"""Name of a layout in the tables -> options of ``expertmesh serve``."""
VLLM, TRANSFORMERS, LLAMA = "vLLM", "transformers", "llama.cpp"
_RATIOS = (
    ("local", TRANSFORMERS),
    ("local", VLLM),
    ("1 + 1", VLLM),
    ("local", LLAMA),
    ("1 + 1", "local"),
)
"""Pairs of compared systems: (system, base)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Format of the weights in expertmesh and in llama.cpp."""

    dtype: Literal["bfloat16", "float32"]
    """Dtype of the computation and of all weights that are not quantized."""
    quantize: IntegerCodes | None = None
    """Format of all matrix products in expertmesh; None if they are not quantized."""
    ggml: GgmlType | None = None
    """Format of the same matrices in llama.cpp; None if llama.cpp is not measured."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element of ``dtype``."""
        return {"bfloat16": 2, "float32": 4}[self.dtype]


WEIGHTS: Mapping[str, Weights] = {
    "bfloat16": Weights(dtype="bfloat16", ggml=BF16),
    "float32": Weights(dtype="float32"),
    "int8": Weights(dtype="bfloat16", quantize="int8", ggml=Q8_0),
    "int4": Weights(dtype="bfloat16", quantize="int4", ggml=Q4_0),
}
"""Name in ``--dtype`` -> weights."""
PLAIN = tuple(name for name, weights in WEIGHTS.items() if weights.quantize is None)
"""Names of the weights that are not quantized."""


@dataclass(frozen=True, order=True, slots=True)
class Row:
    """One system of the tables."""

    system: str
    """Name of the system."""
    weights: str
    """Name of its weights in ``WEIGHTS``."""


Samples = Mapping[Row, Mapping[int, Sequence[Sample]]]
"""System -> batch size -> samples in the order of the repeats."""


@dataclass(slots=True)
class Found:
    """Results of all systems."""

    samples: dict[Row, dict[int, list[Sample]]] = field(default_factory=dict)
    """System -> batch size -> samples in the order of the repeats."""
    bandwidth: list[float] = field(default_factory=list)
    """Bytes of memory that all cores read in a second, in each repeat."""
    absent: dict[str, str] = field(default_factory=dict)
    """Name of a system -> why it was not measured."""


def report(args: argparse.Namespace, model: RandomModel, num_cores: int, found: Found) -> str:
    """Return the Markdown section: conditions, rates with the bounds, ratios."""
    head = [
        "system",
        *(f"{what}, batch {b}" for b in args.batch for what in ("tokens/s", "decode tokens/s")),
    ]
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
        parts.append(table(["ratio", *(f"batch {b}" for b in args.batch)], ratios))
    return "\n\n".join(parts)


def bound(model: RandomModel, found: Found, batch: int, name: str) -> float:
    """Tokens a second of a decode step that reads each weight once and does nothing else.

    ``name`` is a name in ``WEIGHTS``; its format in expertmesh counts.
    """
    weights = WEIGHTS[name]
    form = FORMATS[weights.quantize] if weights.quantize else None
    layers: QuantizeLayers = "experts" if form is None else "all"
    bandwidth = statistics.median(found.bandwidth)
    return decode_bound(model, batch, bandwidth, weights.itemsize, form, layers)


def best(samples: Samples, system: str, batch: int, among: Sequence[str] = PLAIN) -> Row | None:
    """A system with its fastest weights in ``among`` at a batch size; None if not measured."""
    rows = [row for row in samples if row.system == system and row.weights in among]
    return max(rows, key=lambda r: median_of(samples[r][batch]).tokens_per_s, default=None)


def _ratio_rows(
    args: argparse.Namespace,
    model: RandomModel,
    found: Found,
    among: Sequence[str],
    suffix: str = "",
) -> list[list[str]]:
    """Rows of ratios: tokens/s within a repeat, and decode rates of expertmesh to the bound.

    Each system counts with its fastest weights in ``among``; ``suffix`` names them in the labels.
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
            rows.append([f"{system}, decode rate / bound{suffix}", *cells])
    return rows


def _words(args: argparse.Namespace, model: RandomModel, num_cores: int, found: Found) -> str:
    bandwidth = statistics.median(found.bandwidth) / 1e9
    words = (
        f"## Peers\n\nAll systems run the same random OLMoE (hidden {model.hidden}, {model.layers} "
        f"layers, {model.experts} experts top-{model.top_k}, ffn {model.ffn}, vocabulary "
        f"{model.vocab}) with prompts of {args.input_len} random tokens, {args.output_len} new "
        f"tokens and greedy sampling, on {num_cores} cores with {num_cores} threads each. `local` "
        "is expertmesh in one process (`--mode local`), `1 + 1` is one attention and one expert "
        "worker; both and vLLM stream over HTTP. transformers (`generate`) and llama.cpp run "
        "without a server. Tokens/s of a batch include the prefill; decode tokens/s are the rate "
        "while all sequences decode. The bound of the decode rate is to read the weights of a step "
        f"once, at the {bandwidth:.1f} GB/s at which {num_cores} threads read memory in the same "
        f"runs. All values are medians of {args.repeats} runs, in which the systems take turns. A "
        "ratio of systems is the median of the ratios of tokens/s within a run, each system with "
        "the dtype of its highest median."
    )
    if quantized := [name for name in args.dtype if name not in PLAIN]:
        words += " " + _words_of_codes(quantized)
    return words


def _words_of_codes(quantized: Sequence[str]) -> str:
    """Explain the quantized formats with these names in ``WEIGHTS``."""
    parts = []
    for name in quantized:
        weights = WEIGHTS[name]
        assert weights.quantize is not None, "it is not plain"
        assert weights.ggml is not None, "llama.cpp has it"
        mine, other = _bits(FORMATS[weights.quantize]), weights.ggml.bits
        parts.append(
            f"{name} {mine:g} in expertmesh and {other:g} in llama.cpp ({weights.ggml.name})"
        )
    return (
        "Attention, experts and head are quantized; bits per element, scales included: "
        f"{', '.join(parts)}. The embedding stays in bfloat16. Bounds use the formats of "
        "expertmesh. A ratio with the name of a format compares the systems in this format; the "
        "other ratios compare bfloat16 or float32."
    )


def _bits(form: WeightFormat) -> float:
    """Bits of an element, including its part of a scale."""
    assert form.group is not None, "it has groups"
    return 8 * form.num_bytes((1, form.group)) / form.group
