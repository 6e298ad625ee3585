"""Rows of ``benchmarks.memory_wall`` for quantized weights: decode beside bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.bounds import step_weight_bytes
from benchmarks.local_runs import WARM_UP_TOKENS, run_batch, threads_kept
from benchmarks.prompts import random_prompts
from benchmarks.random_checkpoint import RandomModel
from benchmarks.timing import decode_interval_of
from benchmarks.wall_engine import open_engine
from benchmarks.wall_rows import LAYERS, Bench, Row, at_least
from cluster.config.cluster import Quantize, QuantizeLayers
from tests.reference.local_engine import LocalEngine
from workers.quantization.rounding import FORMATS

_PROMPT_TOKENS = 128
_NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One way to keep weights."""

    quantize: Quantize
    layers: QuantizeLayers
    asked: float
    """Least ratio to the rate of bfloat16; of experts alone: to what the bytes allow."""

    @property
    def name(self) -> str:
        return f"{self.quantize}, {'experts' if self.layers == 'experts' else 'all products'}"


KINDS = (
    Kind(quantize="int8", layers="experts", asked=0.9),
    Kind(quantize="int4", layers="experts", asked=0.9),
    Kind(quantize="int8", layers="all", asked=1.6),
    Kind(quantize="int4", layers="all", asked=2.5),
)


def quantized(bench: Bench) -> list[Row]:
    """4 layers of full width at batch 1, each kind beside bfloat16 in turns."""
    model = bench.size(LAYERS)
    prompt, new = bench.tokens(_PROMPT_TOKENS), bench.tokens(_NEW_TOKENS)
    plain: list[float] = []
    rates: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    bandwidths: list[float] = []
    with threads_kept():
        engines = {kind: _engine(bench, model, kind) for kind in (None, *KINDS)}
        for engine in engines.values():
            run_batch(engine, random_prompts("warm", 1, prompt), WARM_UP_TOKENS)
        for repeat in range(bench.repeats):
            bench.wait()
            bandwidths.append(bench.bandwidth(bench.cores))
            for kind, engine in engines.items():
                times = run_batch(engine, random_prompts(f"{repeat}", 1, prompt), new)
                rate = decode_interval_of(times).tokens_per_s or 0.0
                (plain if kind is None else rates[kind]).append(rate)
    whole = step_bytes(model, None)
    found = []
    for kind in KINDS:
        read = step_bytes(model, kind)
        found.append(
            Row(
                what=f"4 layers of OLMoE-1B-7B, {kind.name}, batch 1",
                unit="tokens/s",
                measured=rates[kind],
                bound=[bandwidth / read for bandwidth in bandwidths],
                asked=at_least(0.7, 0.8),
            )
        )
        gains = [rate / base for rate, base in zip(rates[kind], plain, strict=True)]
        is_experts = kind.layers == "experts"
        found.append(
            Row(
                what=f"{kind.name}, over bfloat16",
                unit="times",
                measured=gains,
                bound=[whole / read if is_experts else 1.0] * len(gains),
                asked=at_least(kind.asked),
            )
        )
    return found


def step_bytes(model: RandomModel, kind: Kind | None) -> float:
    """Bytes of weights that a step of one row reads; ``kind`` None: all in bfloat16.

    Norms and the router stay in bfloat16.
    """
    if kind is None:
        return step_weight_bytes(model, 1, torch.bfloat16.itemsize)
    form = FORMATS["int8" if kind.quantize == "int8" else "int4"]
    total = 0.0
    for name, shape in model.shapes().items():
        if "embed_tokens" in name:
            continue
        is_expert = ".experts." in name
        is_kept = len(shape) != 2 or name.endswith("mlp.gate.weight")
        share = model.top_k / model.experts if is_expert else 1.0
        if is_kept or not (is_expert or kind.layers == "all"):
            total += share * torch.Size(shape).numel() * torch.bfloat16.itemsize
        else:
            total += share * form.num_bytes((shape[0], shape[1]))
    return total


def _engine(bench: Bench, model: RandomModel, kind: Kind | None) -> LocalEngine:
    if kind is None:
        return open_engine(bench, model)
    return open_engine(bench, model, quantize=kind.quantize, quantize_layers=kind.layers)


ROWS = {"quantized": quantized}
