"""Speed of models in public shapes, compared with the device's peak and transformers.

Weights are random, and drawn on the device. The bound of a decode step is reading each weight that
it needs, and the keys and values of its rows, once at the device's rate of reading, which is
measured beside it; the bound of prefill is its products at the rate of a large one. Steps are also
compared with the roofline's predictions, on which ``plan size`` and ``--mode auto`` rely.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from msgspec.structs import replace

from benchmarks.checkpoints.public_shape import public_shape
from benchmarks.checkpoints.random_checkpoint import TINY, RandomModel
from benchmarks.gpu_check.ceilings import matrix_rate, read_bandwidth
from benchmarks.gpu_check.device import synchronize
from benchmarks.gpu_check.predicted import compare, device_spec, model_size, summary
from benchmarks.gpu_check.section import Place, Report
from benchmarks.gpu_check.step_costs import cost_of_steps, median_step_s, steps
from benchmarks.gpu_check.transformers_peer import TransformersPeer
from benchmarks.gpu_check.weights import RandomCheckpoint
from benchmarks.harness.both_roles import take_both_roles
from benchmarks.harness.local_engine import LocalEngine, block_bytes
from benchmarks.harness.prompts import random_prompts
from benchmarks.memory_wall.bounds import prefill_flops, step_weight_bytes
from cluster.config.cluster import GPU_STEP_TOKENS, EngineSection
from cluster.config.kv_cache import KvCacheDType
from workers.engine.prefill_cap import PrefillCap
from workers.quantization.formats import WeightFormat
from workers.requests.request import Request, SamplingParams

OLMOE = RandomModel(hidden=2048, layers=16, heads=16, ffn=1024)
"""Shape of OLMoE-1B-7B."""
QWEN3 = public_shape("Qwen3-30B-A3B", layers=24)
"""Half of Qwen3-30B-A3B."""
BATCHES = (1, 64, 256)
_BOTH_ROLES_BATCH = 64
_PREFILL = (8, 2000)
"""Number of prompts and their tokens."""
_DTYPE = torch.bfloat16
_MORE_TOKENS = 192
"""Tokens of a sequence after its prompt: tokens decoded while others prefill, and measured
steps."""
_GREEDY = SamplingParams(max_tokens=_MORE_TOKENS, temperature=0.0, ignore_eos=True)
_SAMPLED = replace(_GREEDY, temperature=0.7, top_p=0.9, seed=1)
_SPARE_BYTES = 12 << 30
"""Bytes of the device's memory for the activations of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The engine, device and rates of a measurement."""

    place: Place
    model: RandomModel
    engine: LocalEngine
    context: int
    read_rate: float
    matrix_rate: float

    def kv_bytes(self, batch: int, tokens: int) -> int:
        """Bytes of keys and values of a batch."""
        cache = self.engine.engine.cache
        return batch * tokens * cache.block_bytes // cache.block_size

    def fits(self, batch: int) -> bool:
        """Whether the keys and values of a batch fit."""
        blocks = self.engine.engine.pool.num_blocks
        return batch * -(-(self.context + _MORE_TOKENS) // 16) <= blocks


def run(place: Place, report: Report) -> None:
    """Measure OLMoE: prefill and decode, also with both roles, an fp8 cache and in transformers."""
    model = TINY if place.is_tiny else OLMOE
    given, steps_s = measure(place, report, model)
    batch = place.size(_BOTH_ROLES_BATCH, 1)
    if batch in steps_s:
        with report.part("both roles"):
            report.value("both roles", both_roles(given, batch, steps_s[batch]))
    context = given.context
    rates = {"read_rate": given.read_rate, "matrix_rate": given.matrix_rate}
    del given
    gc.collect()  # an engine and its graphs refer to each other
    with report.part("fp8 cache"):
        engine = make_engine(place, model, context, max(steps_s), kind="fp8")
        given = Run(place=place, model=model, engine=engine, context=context, **rates)
        report.value("fp8 cache", fp8_cache(given, steps_s))
        del given, engine
        gc.collect()
    with report.part("transformers"):
        beside_transformers(place, report, model, context, steps_s)


def qwen3(place: Place, report: Report) -> None:
    """Measure half of the layers of Qwen3-30B-A3B, so that a batch of 256 fits beside them."""
    tiny = dataclasses.replace(TINY, family="qwen3_moe")
    measure(place, report, tiny if place.is_tiny else QWEN3)


def measure(place: Place, report: Report, model: RandomModel) -> tuple[Run, dict[int, float]]:
    """Measure decode at each batch size, then prefill; returns the engine and seconds of steps."""
    device = place.device
    read_rate = read_bandwidth(device, place.size(2 << 30, 1 << 20))
    rate = matrix_rate(device, place.size(8192, 64))
    batches = BATCHES[: place.size(len(BATCHES), 1)]
    context = place.size(1024, 24)
    start = time.perf_counter()
    engine = make_engine(place, model, context, max(batches))
    synchronize(device)
    report.value("load_s", time.perf_counter() - start)
    given = Run(
        place=place,
        model=model,
        engine=engine,
        context=context,
        read_rate=read_rate,
        matrix_rate=rate,
    )
    report.value("read_bytes_per_s", read_rate)
    report.value("bf16_flops", rate)
    shares, steps_s, words = {}, {}, ""
    for batch in batches:
        with report.part(f"decode {batch}"):
            if not given.fits(batch):
                report.value(f"decode {batch}", "not run: its keys and values have no room")
                continue
            found = decode(given, batch)
            report.value(f"decode {batch}", found)
            shares[batch], steps_s[batch] = found["share_of_bound"], found["step_s"]
            words = ", ".join(f"{share:.2f} (batch {b})" for b, share in shares.items())
            report.say(f"decode {words} of the read bound")
    with report.part("roofline"):
        predicted = compare(model_size(model, _DTYPE), device_spec(device), context, steps_s)
        report.value("roofline", predicted)
        report.say(f"decode {words} of the read bound; {summary(predicted)}")
    with report.part("prefill"):
        found = prefill(given, GPU_STEP_TOKENS)
        report.value("prefill", found)
        report.say(
            f"decode {words}, prefill {found['share_of_bound']:.2f} of the bound; "
            f"{summary(predicted)}"
        )
    return given, steps_s


def beside_transformers(
    place: Place, report: Report, model: RandomModel, context: int, steps_s: Mapping[int, float]
) -> None:
    """Decode rate of ``generate`` and the ratio of our rate to it, by batch size."""
    if find_spec("transformers") is None:
        report.value("transformers", "not installed")
        return
    if place.is_gpu:
        torch.cuda.empty_cache()
    peer = TransformersPeer(place, model)
    for batch, step_s in steps_s.items():
        with report.part(f"transformers {batch}"):
            try:
                rate = peer.decode_rate(batch, context)
            except torch.OutOfMemoryError:
                report.value(f"transformers {batch}", "not run: it does not fit into memory")
                continue
            found = {"tokens_per_s": rate, "times_as_fast": batch / step_s / rate}
            report.value(f"transformers {batch}", found)


def make_engine(
    place: Place,
    model: RandomModel,
    context: int,
    batch: int,
    form: WeightFormat | None = None,
    kind: KvCacheDType = "auto",
) -> LocalEngine:
    """Open an engine whose cache of a ``kind`` holds a batch, or as much as fits; ``form`` is the
    format of the experts."""
    checkpoint = RandomCheckpoint(model, place.device, form=form)
    each = block_bytes(checkpoint.config, 16, _DTYPE)
    wanted = batch * -(-(context + _MORE_TOKENS) // 16) * each
    if place.is_gpu:
        weights = int(2 * sum(torch.Size(shape).numel() for shape in model.shapes().values()))
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(place.device)[0] - weights - _SPARE_BYTES
        wanted = max(min(wanted, free), 64 * each)
    rows = place.size(8192, 64)
    section = EngineSection(
        kv_cache_bytes=wanted,
        max_num_seqs=batch,
        max_num_batched_tokens=rows,
        enable_prefix_caching=False,
        kv_cache_dtype=kind,
    )
    return LocalEngine(
        checkpoint,
        dtype="bfloat16",
        device=str(place.device),
        section=section,
        max_model_len=max(context, place.size(_PREFILL[1], 0)) + _MORE_TOKENS,
        kernels="torch",
    )


def decode(given: Run, batch: int) -> dict[str, Any]:
    """Measure steps in which all sequences of a batch decode, with greedy and random sampling."""
    place, engine = given.place, given.engine
    if place.is_gpu:
        torch.cuda.reset_peak_memory_stats(place.device)
    names, prefill_s = fill(given, batch, given.context)
    steps(engine, place.size(4, 1))
    step_s = median_step_s(engine, place.size(24, 2))
    cost = cost_of_steps(engine, place.device, place.size(4, 1))
    for name in names:
        engine.engine.abort(name)
    names, _ = fill(given, batch, given.context, _SAMPLED)
    steps(engine, place.size(4, 1))
    sampled_s = median_step_s(engine, place.size(24, 2))
    for name in names:
        engine.engine.abort(name)
    read = step_weight_bytes(given.model, batch, _DTYPE.itemsize)
    read += given.kv_bytes(batch, given.context)
    found = {
        "gpu_busy": cost["busy_s"] / step_s,
        "tokens_per_s": batch / step_s,
        "step_s": step_s,
        "sampled_times_greedy": sampled_s / step_s,
        "bound_tokens_per_s": batch * given.read_rate / read,
        "share_of_bound": read / given.read_rate / step_s,
        "prefill_s": prefill_s,
        **cost,
    }
    if place.is_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(place.device)
    return found


def prefill(given: Run, step_tokens: int) -> dict[str, Any]:
    """Measure the second run of prompts up to their first tokens, in steps of ``step_tokens``."""
    given.engine.prefill_cap = PrefillCap(max_rows=step_tokens)
    number, tokens = _PREFILL if not given.place.is_tiny else (2, given.context)
    took = 0.0
    for _ in range(2):
        names, took = fill(given, number, tokens)
        for name in names:
            given.engine.engine.abort(name)
    bound_s = number * prefill_flops(given.model, tokens) / given.matrix_rate
    rate = number * tokens / took
    return {"tokens_per_s": rate, "seconds": took, "share_of_bound": bound_s / took}


def both_roles(given: Run, batch: int, local_s: float) -> dict[str, Any]:
    """Measure decode steps in which an attention and an expert role exchange rows on the device,
    compared with ``local_s`` of a step without an exchange. The engine keeps the roles."""
    take_both_roles(given.engine)
    found = decode(given, batch)
    return {**found, "share_of_local": local_s / found["step_s"]}


def fp8_cache(given: Run, plain_s: Mapping[int, float]) -> dict[int, dict[str, Any]]:
    """Measure decode steps with keys and values in fp8, compared with ``plain_s`` of a step with a
    bfloat16 cache, by batch size."""
    found = {}
    for batch, step_s in plain_s.items():
        own = decode(given, batch)
        found[batch] = {**own, "times_as_fast": step_s / own["step_s"]}
    return found


def fill(
    given: Run, batch: int, tokens: int, params: SamplingParams = _GREEDY
) -> tuple[list[str], float]:
    """Add a batch and run steps until each sequence has a token; returns names and seconds."""
    engine = given.engine
    names = [f"{batch} x {tokens}, {i}" for i in range(batch)]
    for name, prompt in zip(names, random_prompts("speed", batch, tokens), strict=True):
        engine.add_request(Request(request_id=name, prompt=tuple(prompt), params=params))
    synchronize(given.place.device)
    start, waiting = time.perf_counter(), set(names)
    while waiting:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            waiting.discard(output.request_id)
    synchronize(given.place.device)
    return names, time.perf_counter() - start
