"""Rows of ``benchmarks.memory_wall`` for quantized weights: decode rates compared with bfloat16.

Weights are quantized while they are loaded (``quantized``), or the checkpoint stores quantized
experts that are used directly (``stored``).
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.local_runs import WARM_UP_TOKENS, run_batch, threads_kept
from benchmarks.harness.prompts import random_prompts
from benchmarks.memory_wall.bounds import step_weight_bytes
from benchmarks.memory_wall.engine import open_engine
from benchmarks.memory_wall.rows import LAYERS, Bench, Row, at_least
from benchmarks.report.timing import decode_interval_of
from cluster.config.model import QuantizeLayers
from workers.model.loading.expert_format import kept_banks
from workers.quantization.formats import WeightFormat
from workers.quantization.rounding import FORMATS, IntegerCodes

_PROMPT_TOKENS = 128
_NEW_TOKENS = 64
_KV_BYTES = 64 << 20
_PLAIN = "bfloat16"
_NUM_STORED = 32
"""Experts of a layer in ``STORED``: few enough for 4 GB, and a step of one row reads as many of
them as of 64."""
_ASKED_OF_EXPERTS = 0.9
"""Required ratio of the speed-up to the ratio of the bytes that are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One way to quantize weights while they are loaded."""

    quantize: IntegerCodes
    layers: QuantizeLayers
    asked: float
    """Required speed-up over bfloat16; for experts alone, its ratio to the ratio of the bytes."""

    @property
    def name(self) -> str:
        return f"{self.quantize}, {'experts' if self.layers == 'experts' else 'all products'}"


KINDS = (
    Kind(quantize="int8", layers="experts", asked=_ASKED_OF_EXPERTS),
    Kind(quantize="int4", layers="experts", asked=_ASKED_OF_EXPERTS),
    Kind(quantize="int8", layers="all", asked=1.6),
    Kind(quantize="int4", layers="all", asked=2.5),
)
STORED = (
    replace(LAYERS, family="qwen3_moe", experts=_NUM_STORED, stored="float8"),
    replace(LAYERS, family="gpt_oss", experts=_NUM_STORED, stored="mxfp4"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rates:
    """Measurements, one for each repeat."""

    tokens_per_s: Mapping[str, list[float]]
    """Name of an engine, such as ``_PLAIN``, -> decode rates."""
    bandwidth: list[float]
    """Bytes of memory that all cores read in a second."""


def quantized(bench: Bench) -> list[Row]:
    """Rows of weights that are quantized on load: 4 layers of full width at batch 1."""
    model = bench.size(LAYERS)
    with threads_kept():
        engines = {_PLAIN: _open(bench, model)} | {
            kind.name: _open(bench, model, quantize=kind.quantize, quantize_layers=kind.layers)
            for kind in KINDS
        }
        rates = _measured(bench, engines)
    found = []
    for kind in KINDS:
        form, is_experts = FORMATS[kind.quantize], kind.layers == "experts"
        read = _step_bytes(model, form, kind.layers)
        found += [
            _against_memory(f"4 layers of OLMoE-1B-7B, {kind.name}", rates, kind.name, read),
            _against_plain(
                rates, kind.name, _step_bytes(model) / read if is_experts else 1.0, kind.asked
            ),
        ]
    return found


def stored(bench: Bench) -> list[Row]:
    """Rows of experts that the checkpoint stores quantized, compared with their bfloat16 values."""
    return [row for model in STORED for row in _stored(bench, model)]


def _stored(bench: Bench, full: RandomModel) -> list[Row]:
    size = replace(bench.size(full), family=full.family, experts=full.experts)
    model, name = replace(size, stored=full.stored), full.stored
    with threads_kept():
        engines = {
            _PLAIN: _open(bench, model, quantize="none"),
            name: _open(bench, model, quantize="auto"),
        }
        rates = _measured(bench, engines)
    form = kept_banks("auto", model.described(), {})[-1].exchanges[0].form
    assert form is not None, "its experts are quantized"
    read = _step_bytes(model, form)
    what = f"4 layers of {model.family} in that width, experts in {name}"
    return [
        _against_memory(what, rates, name, read),
        _against_plain(rates, name, _step_bytes(model) / read, _ASKED_OF_EXPERTS),
    ]


def _open(bench: Bench, model: RandomModel, **options: Any) -> LocalEngine:
    """Open an engine with a small KV cache, as several are open at the same time."""
    gc.collect()  # the engines of earlier rows
    return open_engine(bench, model, kv_cache_bytes=_KV_BYTES, **options)


def _measured(bench: Bench, engines: Mapping[str, LocalEngine]) -> _Rates:
    """Measure the decode rates of one sequence on each engine in turns."""
    prompt, new = bench.tokens(_PROMPT_TOKENS), bench.tokens(_NEW_TOKENS)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    bandwidth: list[float] = []
    for engine in engines.values():
        run_batch(engine, random_prompts("warm", 1, prompt), WARM_UP_TOKENS)
    for repeat in range(bench.repeats):
        bench.wait()
        bandwidth.append(bench.bandwidth(bench.cores))
        for name, engine in engines.items():
            times = run_batch(engine, random_prompts(f"{repeat}", 1, prompt), new)
            rates[name].append(decode_interval_of(times).tokens_per_s or 0.0)
    return _Rates(tokens_per_s=rates, bandwidth=bandwidth)


def _against_memory(what: str, rates: _Rates, name: str, read: float) -> Row:
    """Row of a decode rate; a step reads ``read`` bytes."""
    return Row(
        what=f"{what}, batch 1",
        unit="tokens/s",
        measured=rates.tokens_per_s[name],
        bound=[bandwidth / read for bandwidth in rates.bandwidth],
        asked=at_least(0.7, 0.8),
    )


def _against_plain(rates: _Rates, name: str, bound: float, asked: float) -> Row:
    mine, plain = rates.tokens_per_s[name], rates.tokens_per_s[_PLAIN]
    gains = [rate / base for rate, base in zip(mine, plain, strict=True)]
    return Row(
        what=f"{name}, speed-up over bfloat16",
        unit="factor",
        measured=gains,
        bound=[bound] * len(gains),
        asked=at_least(asked),
    )


def _step_bytes(
    model: RandomModel, form: WeightFormat | None = None, layers: QuantizeLayers = "experts"
) -> float:
    """Bytes of weights that a step of one row reads; unquantized weights are bfloat16."""
    return step_weight_bytes(model, 1, torch.bfloat16.itemsize, form, layers)


ROWS = {"quantized": quantized, "stored": stored}
