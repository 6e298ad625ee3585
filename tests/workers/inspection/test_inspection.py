"""Inspections of the local engine against transformers: hidden states, routers, logits, losses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.core.errors import QueueFullError, RequestError
from gateway.calls.losses import aux_loss
from tests.harness.tiers import quick_rows, quick_values
from tests.reference.goldens import BF16_VARIANTS, FIRST_BF16, MAX_MODEL_LEN, Golden
from tests.reference.parity import router_kinds
from workers.inspection.buffers import shape_of
from workers.inspection.inspector import Inspector
from workers.requests.inspection import (
    IGNORED_LABEL,
    MAX_ATTENTION_TOKENS,
    InspectionParams,
    ModelShape,
    Pooling,
    num_bytes,
)
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.sampling.sampler import logprob_entries

pytestmark = pytest.mark.heavy

VARIANTS = (
    "olmoe-base",
    "olmoe-norm-gqa-clip",
    "olmoe-rope-dynamic",
    "dots1-groups",
    "dots1-swa",
    "dots1-relu-dynamic-fp16",
    "jetmoe-tied",
    "jetmoe-relu-dynamic",
    "qwen3moe-dense-layers",
    "qwen3moe-window-bias-tied",
    "glm4moe-norms-groups",
    "glm4moe-dynamic-fp16",
    "mixtral-window-tied",
    "minimaxm2-official-like",
    "ernie45-layers",
    "deepseekv3-base",
    "deepseekv2-official-like",
    "glm4lite-layers-tied",
    "qwen3next-layers-bias-tied",
    "qwen35moe-official-like",
)
CHUNKED = EngineSection(max_num_seqs=3, max_num_batched_tokens=7, block_size_tokens=4)


def has_aux(variant: str) -> bool:
    """Whether the family has an auxiliary loss."""
    return not variant.startswith(("dots1", "glm4", "deepseek"))


def everything(prompt: tuple[int, ...], aux: bool) -> InspectionParams:
    return InspectionParams(
        logits=tuple(range(len(prompt))),
        labels=prompt,
        embedding=Pooling.MEAN,
        hidden_states=True,
        router_logits=True,
        routes=True,
        attentions=True,
        aux=aux,
    )


def looks_like_probabilities(maps: Tensor) -> bool:
    """Rows of [L, A, T, T] that sum to 1 and do not look ahead."""
    sums = maps.sum(-1)
    return bool((sums - 1).abs().max() < 1e-5 and not maps.triu(1).any())


@pytest.mark.parametrize(("variant", "num_micro_batches"), quick_values(VARIANTS, [1, 2]))
def test_equals_golden_in_chunks_beside_others(
    golden: Callable[[str], Golden], variant: str, num_micro_batches: int
) -> None:
    expected = golden(variant)
    engine = LocalEngine(
        expected.path,
        dtype="float32",
        section=CHUNKED,
        max_model_len=MAX_MODEL_LEN,
        num_micro_batches=num_micro_batches,
    )
    aux = has_aux(variant)
    found = engine.inspect(expected.prompts, [everything(p, aux) for p in expected.prompts])
    for i, (prompt, arrays) in enumerate(zip(expected.prompts, found, strict=True)):
        tensors, length = expected.tensors, len(prompt)
        states = tensors[f"p{i}.hidden_states"]
        assert (arrays["hidden_states"] - states).abs().max() < 1e-4
        assert (arrays["embedding"] - states[-1].mean(0)).abs().max() < 1e-4
        logits = tensors[f"p{i}.logits"]
        assert (arrays["logits"] - logits).abs().max() < 5e-4
        assert arrays["logprobs"][0].isnan()
        own = logits[:-1].log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        if length > 1:
            assert (arrays["logprobs"][1:] - own).abs().max() < 5e-4
        assert looks_like_probabilities(arrays["attentions"])
        for kind, banks in router_kinds(engine).items():
            names = [f"{engine.banks[b].bank}:{engine.banks[b].layer}" for b in banks]
            seen = torch.stack([arrays[f"router_logits:{n}"] for n in names])
            assert (seen - tensors[f"p{i}.{kind}_logits"][:, :length]).abs().max() < 1e-4
            ids, order = torch.stack([arrays[f"topk_ids:{n}"] for n in names]).sort(-1)
            assert torch.equal(ids, tensors[f"p{i}.{kind}_ids"][:, :length])
            weights = torch.stack([arrays[f"topk_weights:{n}"] for n in names]).gather(-1, order)
            assert (weights - tensors[f"p{i}.{kind}_weights"][:, :length]).abs().max() < 1e-4
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


@pytest.mark.parametrize("variant", quick_rows(FIRST_BF16, BF16_VARIANTS))
def test_bfloat16_is_near_golden(golden: Callable[[str], Golden], variant: str) -> None:
    """By the rule of bfloat16: medians, and the best token where it is clear."""
    expected = golden(variant)
    engine = LocalEngine(expected.path, dtype="bfloat16", section=CHUNKED)
    found = engine.inspect(
        expected.prompts,
        [
            InspectionParams(logits=tuple(range(len(p))), labels=p, hidden_states=True, routes=True)
            for p in expected.prompts
        ],
    )
    logits = torch.cat([arrays["logits"] for arrays in found])
    names = ("logits_bf16", "logits")
    theirs, exact = (
        torch.cat([expected.tensors[f"p{i}.{name}"] for i in range(len(found))]) for name in names
    )
    assert (logits - theirs).abs().median() < 0.3
    assert (logits - exact).abs().median() < 0.5
    best = exact.topk(2, -1).values
    is_clear = best[:, 0] - best[:, 1] > 2
    assert (logits.argmax(-1) == exact.argmax(-1))[is_clear].float().mean() > 0.9
    for i, (prompt, arrays) in enumerate(zip(expected.prompts, found, strict=True)):
        states = expected.tensors[f"p{i}.hidden_states_bf16"]
        assert (arrays["hidden_states"] - states).abs().median() < 0.1
        rows = torch.arange(len(prompt) - 1)
        own = arrays["logits"].log_softmax(-1)[rows, torch.tensor(prompt[1:], dtype=torch.int64)]
        assert torch.allclose(arrays["logprobs"][1:], own, atol=1e-4)
        for bank in engine.banks:
            weights = arrays[f"topk_weights:{bank.bank}:{bank.layer}"]
            is_float32 = bank.float32_weights
            assert torch.equal(weights, weights.bfloat16().float()) is not is_float32


def bits_of(arrays: dict[str, Tensor]) -> dict[str, bytes]:
    """All but attention maps, which vary within rounding."""
    return {
        name: array.numpy().tobytes()
        for name, array in arrays.items()
        if not name.startswith("attentions")
    }


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("olmoe-norm-gqa-clip", "float32"),
        ("dots1-swa", "bfloat16"),
        ("jetmoe-tied", "float32"),
        pytest.param("olmoe-base", "bfloat16", marks=pytest.mark.slow),
        pytest.param("dots1-groups", "float32", marks=pytest.mark.slow),
        pytest.param("jetmoe-gelu-yarn-fp16", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_deterministic_inspections_have_the_same_bits_in_any_company(
    golden: Callable[[str], Golden], variant: str, dtype: str
) -> None:
    expected = golden(variant)
    prompts, aux = expected.prompts, has_aux(variant)

    def engine(section: EngineSection, num_micro_batches: int = 1) -> LocalEngine:
        return LocalEngine(
            expected.path, dtype=dtype, section=section, num_micro_batches=num_micro_batches
        )

    whole = engine(EngineSection(deterministic="on", enable_prefix_caching=False))
    alone = [whole.inspect([prompt], everything(prompt, aux))[0] for prompt in prompts]
    mixed = engine(replace(CHUNKED, deterministic="on"), num_micro_batches=2)
    together = mixed.inspect(prompts, [everything(prompt, aux) for prompt in prompts])
    for got, want in zip(together, alone, strict=True):
        assert bits_of(got) == bits_of(want)
        assert (got["attentions"] - want["attentions"]).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("olmoe-norm-gqa-clip", marks=pytest.mark.slow),
        pytest.param("dots1-swa", marks=pytest.mark.slow),
        pytest.param("deepseekv3-base", marks=pytest.mark.slow),
        "jetmoe-tied",
    ],
)
def test_attention_maps_equal_those_of_transformers(
    golden: Callable[[str], Golden], variant: str, tmp_path: Path
) -> None:
    expected = golden(variant)
    prompt = max((p for p in expected.prompts if len(p) <= 40), key=len)
    code = (
        "import sys, torch, json\n"
        "from transformers import AutoModelForCausalLM\n"
        "path, target, prompt = sys.argv[1:]\n"
        "model = AutoModelForCausalLM.from_pretrained(\n"
        "    path, dtype=torch.float32, attn_implementation='eager').eval()\n"
        "with torch.no_grad():\n"
        "    got = model(torch.tensor([json.loads(prompt)]), output_attentions=True)\n"
        "torch.save(torch.stack(got.attentions)[:, 0], target)\n"
    )
    target = tmp_path / "maps.pt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(expected.path), str(target), str(list(prompt))]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=540)
    engine = LocalEngine(expected.path, dtype="float32", section=CHUNKED)
    found = engine.inspect([prompt], InspectionParams(attentions=True))[0]["attentions"]
    assert (found - torch.load(target)).abs().max() < 1e-4


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("variant", ["olmoe-base", "jetmoe-tied"])
def test_auxiliary_loss_in_both_spellings(
    golden: Callable[[str], Golden], variant: str, is_masked: bool
) -> None:
    """Without a mask pad tokens count like all others."""
    expected = golden(variant)
    engine = LocalEngine(expected.path, dtype="float32", section=CHUNKED)
    ids, mask = (expected.tensors[f"batch.{n}"] for n in ("input_ids", "attention_mask"))
    kept = mask.bool() if is_masked else torch.ones_like(mask, dtype=torch.bool)
    rows = [row[keep].tolist() for row, keep in zip(ids, kept, strict=True)]
    found = engine.inspect(rows, InspectionParams(aux=True))
    names = [f"{bank.bank}:{bank.layer}" for bank in engine.banks]
    sums = [{name: arrays[f"aux:{name}"].numpy() for name in names} for arrays in found]
    losses = aux_loss(sums, [len(row) for row in rows], shape_of(engine.config, engine.banks).banks)
    end = "" if is_masked else "_nomask"
    five = expected.tensors[f"batch.aux_loss{end}"]
    four = expected.tensors.get(f"batch.aux_loss_v4{end}", five)
    assert losses["transformers_5"] == pytest.approx(five.item(), abs=1e-4)
    assert losses["transformers_4"] == pytest.approx(four.item(), abs=1e-4)


def test_last_state_comes_from_the_prefix_cache_where_it_can(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=EngineSection(block_size_tokens=4))
    prompt = tuple(range(3, 33))
    states = engine.inspect([prompt], InspectionParams(hidden_states=True))[0]["hidden_states"]
    hits = "prefix_cache_hits_total"
    assert engine.engine.stats()[hits] == 0
    last = engine.inspect([prompt], InspectionParams(embedding=Pooling.LAST))[0]["embedding"]
    assert engine.engine.stats()[hits] == 28
    assert (last - states[-1, -1]).abs().max() < 1e-5
    label = (IGNORED_LABEL,) * 21 + prompt[21:22] + (IGNORED_LABEL,) * 8
    scored = engine.inspect([prompt], InspectionParams(labels=label))[0]["logprobs"]
    assert engine.engine.stats()[hits] == 28 + 20  # the label's logits are those of position 20
    want = engine.logits(states[-1, 20:21]).log_softmax(-1)[0, prompt[21]]
    assert abs(scored[21] - want) < 1e-5
    assert scored.isnan().sum() == 29


def test_rows_that_come_again_count_once(tiny_checkpoint: Path) -> None:
    """A request of higher priority takes the blocks of an inspection that is half done."""
    section = EngineSection(
        block_size_tokens=4, max_num_seqs=1, max_num_batched_tokens=8, enable_prefix_caching=False
    )
    prompt = tuple(range(3, 43))
    wanted = everything(prompt, aux=True)
    alone = LocalEngine(tiny_checkpoint, section=section).inspect([prompt], wanted)[0]
    engine = LocalEngine(tiny_checkpoint, section=section)
    engine.add_request(_request("slow", prompt, wanted, priority=1))
    engine.step()
    engine.step()
    engine.add_request(_request("quick", prompt[:6], None))
    outputs = [o for _ in range(40) for o in engine.step()]
    assert engine.engine.stats()["num_preemptions_total"] == 1
    arrays = {a.name: a for o in outputs for a in o.arrays}
    assert sorted(arrays) == sorted(alone)
    for name, array in arrays.items():
        got = torch.frombuffer(
            bytearray(array.data), dtype=torch.int32 if array.dtype == "int32" else torch.float32
        )
        assert torch.allclose(
            got.float(), alone[name].flatten().float(), atol=1e-5, equal_nan=True
        ), name


def test_a_step_that_fails_adds_nothing(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=CHUNKED)
    prompt = tuple(range(3, 33))
    wanted = everything(prompt, aux=True)
    alone = engine.inspect([prompt], wanted)[0]
    dispatcher, calls = engine.dispatcher, 0
    dispatch = dispatcher.dispatch

    def fail_sometimes(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise ConnectionError("lost")
        return dispatch(*arguments)  # type: ignore[arg-type]

    dispatcher.dispatch = fail_sometimes  # type: ignore[method-assign, assignment]
    engine.add_request(_request("again", prompt, wanted))
    outputs, failures = [], 0
    while engine.engine.has_work:
        try:
            outputs += engine.step()
        except ConnectionError:
            failures += 1
    assert failures > 1
    assert len(outputs) == 1
    for array in outputs[0].arrays:
        kind = torch.int32 if array.dtype == "int32" else torch.float32
        got = torch.frombuffer(bytearray(array.data), dtype=kind).view(array.shape)
        assert torch.equal(got.nan_to_num(), alone[array.name].nan_to_num()), array.name


def test_what_cannot_be_had_is_refused(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, max_model_len=512)
    prompt = (5,) * 40
    for wanted, text in {
        InspectionParams(labels=(1, 2)): "labels has 2 entries for 40 tokens",
        InspectionParams(labels=(96,) * 40): "labels has 96, it must be -100 or 0 to 95",
        InspectionParams(logits=(3, 40)): "positions 3 to 40 are out of range for 40 tokens",
    }.items():
        with pytest.raises(RequestError, match=text):
            engine.inspect([prompt], wanted)
    long = (5,) * (MAX_ATTENTION_TOKENS + 1)
    with pytest.raises(RequestError, match="attentions of 257 tokens are too many, at most 256"):
        engine.inspect([long], InspectionParams(attentions=True))
    with pytest.raises(RequestError, match="needs n 1, max_tokens 0"):
        engine.add_request(
            Request(
                request_id="x",
                prompt=prompt,
                params=SamplingParams(max_tokens=1),
                inspection=InspectionParams(aux=True),
            )
        )
    assert not engine.engine.has_work


def test_sizes_are_bounded_together(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    inspector = Inspector(
        engine.config, engine.banks, engine.logits, logprob_entries, max_held_bytes=50_000
    )
    request = _request("a", (5,) * 100, InspectionParams(hidden_states=True))
    sequence = SequenceState(request, choice=0, arrival=0, deadline=0.0)
    inspector.check(request)
    inspector.start(sequence)
    with pytest.raises(QueueFullError, match="inspections hold 38400 bytes, at most 50000"):
        inspector.check(request)
    inspector.end(sequence)
    inspector.check(request)


def test_sizes() -> None:
    shape = ModelShape(
        hidden_size=10,
        num_layers=2,
        num_attention_layers=1,
        num_heads=4,
        vocab_size=96,
        num_labels=0,
        banks=(),
    )
    assert num_bytes(InspectionParams(logits=(1, 2), labels=(1,) * 7), 7, shape) == 4 * (2 * 96 + 7)
    assert num_bytes(InspectionParams(hidden_states=True), 7, shape) == 4 * 3 * 7 * 10
    assert num_bytes(InspectionParams(attentions=True), 7, shape) == 4 * 1 * 4 * 49


def _request(
    name: str, prompt: tuple[int, ...], wanted: InspectionParams | None, priority: int = 0
) -> Request:
    params = SamplingParams(max_tokens=0 if wanted else 4, ignore_eos=True, temperature=0.0)
    return Request(
        request_id=name, prompt=prompt, params=params, priority=priority, inspection=wanted
    )
