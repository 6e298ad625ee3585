"""The local engine against transformers on all OLMoE goldens: float32 exactly, bfloat16 by rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cluster.config import EngineSection
from tests.goldens import (
    BF16_VARIANTS,
    MAX_MODEL_LEN,
    NUM_NEW_TOKENS,
    NUM_PROMPTS,
    OLMOE_VARIANTS,
    Golden,
)
from workers.kv_cache import block_bytes
from workers.local_engine import LocalEngine
from workers.request import SamplingParams

GREEDY = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)


class RowRecorder:
    """``Recorder`` of one request served alone: rows of all its steps, one after the other."""

    def __init__(self, num_layers: int) -> None:
        self._hidden: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]
        self._routers: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._calls = 0

    def hidden(self, state: Tensor) -> None:
        """See ``Recorder``."""
        self._hidden[self._calls % len(self._hidden)].append(state.clone())
        self._calls += 1

    def router(self, bank: int, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See ``Recorder``."""
        self._routers.setdefault(bank, []).append((logits.clone(), ids.clone(), weights.clone()))

    @property
    def hidden_states(self) -> Tensor:
        """[L + 1, rows, H] float32."""
        return torch.stack([torch.cat(states) for states in self._hidden]).float()

    def routers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [L, rows, E], ids [L, rows, k] ascending, and their weights."""
        joined = [
            [torch.cat(part) for part in zip(*steps, strict=True)]
            for _, steps in sorted(self._routers.items())
        ]
        logits, ids, weights = (torch.stack(part) for part in zip(*joined, strict=True))
        ids, order = ids.sort(-1)
        return logits.float(), ids, weights.gather(-1, order).float()


def record(engine: LocalEngine, prompt: tuple[int, ...], params: SamplingParams) -> RowRecorder:
    """Serve one prompt and keep what the layers saw."""
    recorder = RowRecorder(engine.config.num_layers)
    engine.engine.recorder = recorder
    engine.generate([prompt], params)
    engine.engine.recorder = None
    return recorder


@pytest.mark.parametrize("variant", OLMOE_VARIANTS)
def test_float32_equals_golden(golden: Callable[[str], Golden], variant: str) -> None:
    expected = golden(variant)
    engine = LocalEngine(expected.path, dtype="float32", max_model_len=MAX_MODEL_LEN)
    tensors = expected.tensors
    for i, prompt in enumerate(expected.prompts):
        seen = record(engine, prompt, GREEDY)
        logits, ids, weights = seen.routers()
        assert torch.equal(ids, tensors[f"p{i}.router_ids"]), f"router ids of p{i}"
        _assert_close(weights, tensors[f"p{i}.router_weights"], 1e-4, f"router weights of p{i}")
        _assert_close(logits, tensors[f"p{i}.router_logits"], 1e-4, f"router logits of p{i}")
        hidden = seen.hidden_states[:, : len(prompt)]
        _assert_close(hidden, tensors[f"p{i}.hidden_states"], 1e-4, f"hidden states of p{i}")
        _assert_close(engine.logits(hidden[-1]), tensors[f"p{i}.logits"], 5e-4, f"logits of p{i}")
        result = engine.generate([prompt], replace(GREEDY, logprobs=0))[0]
        assert result.token_ids == expected.greedy(i), f"greedy tokens of p{i}"
        drawn = torch.tensor([entry.logprob for entry in result.logprobs])
        _assert_close(drawn, tensors[f"p{i}.greedy_logprob"].float(), 5e-4, f"logprobs of p{i}")
    together = engine.generate(expected.prompts, GREEDY)
    for i, result in enumerate(together):
        assert result.token_ids == expected.greedy(i), f"greedy tokens of p{i} in a batch"
    assert engine.engine.num_free_blocks == engine.engine.num_blocks


@pytest.mark.slow
@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("num_rows", [7, 33])
@pytest.mark.parametrize("block_size", [1, 5])
@pytest.mark.parametrize("variant", OLMOE_VARIANTS)
def test_float32_tokens_survive_small_steps_and_few_blocks(
    golden: Callable[[str], Golden],
    variant: str,
    block_size: int,
    num_rows: int,
    num_micro_batches: int,
) -> None:
    expected = golden(variant)
    config = LocalEngine(expected.path, dtype="float32").config
    section = EngineSection(
        block_size_tokens=block_size,
        max_num_seqs=6,
        max_num_batched_tokens=num_rows,
        kv_cache_bytes=170 * block_bytes(config, 1, torch.float32),
    )
    engine = LocalEngine(
        expected.path,
        dtype="float32",
        section=section,
        max_model_len=MAX_MODEL_LEN,
        num_micro_batches=num_micro_batches,
    )
    results = engine.generate(expected.prompts, GREEDY)
    assert [r.token_ids for r in results] == [expected.greedy(i) for i in range(NUM_PROMPTS)]
    assert engine.engine.stats()["num_preemptions_total"] > 0
    engine.engine.check_integrity()


@pytest.mark.parametrize("variant", BF16_VARIANTS)
def test_bfloat16_is_near_golden(golden: Callable[[str], Golden], variant: str) -> None:
    expected = golden(variant)
    engine = LocalEngine(expected.path, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
    ours, exact, theirs = [], [], []
    for i, prompt in enumerate(expected.prompts):
        seen = record(engine, prompt, SamplingParams(max_tokens=1, temperature=0.0))
        ours.append(engine.logits(seen.hidden_states[-1]).float())
        exact.append(expected.tensors[f"p{i}.logits"])
        theirs.append(expected.tensors[f"p{i}.logits_bf16"])
    got, want, want_bf16 = torch.cat(ours), torch.cat(exact), torch.cat(theirs)
    assert (got - want_bf16).abs().median() < 0.3
    assert (got - want).abs().median() < 0.5
    best = want.topk(2, -1).values
    is_clear = best[:, 0] - best[:, 1] > 2
    agrees = (got.argmax(-1) == want.argmax(-1))[is_clear]
    assert agrees.float().mean() > 0.9


@pytest.mark.parametrize("variant", BF16_VARIANTS)
def test_bfloat16_together_equals_alone_at_equal_lengths(
    golden: Callable[[str], Golden], variant: str
) -> None:
    expected = golden(variant)
    engine = LocalEngine(expected.path, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
    base = expected.prompt(NUM_PROMPTS - 1)
    prompts = [base[i : i + 24] for i in range(0, 64, 8)]
    alone = [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    together = [result.token_ids for result in engine.generate(prompts, GREEDY)]
    assert together == alone


def _assert_close(got: Tensor, want: Tensor, limit: float, what: str) -> None:
    assert got.shape == want.shape, what
    worst = (got - want).abs().max().item()
    assert worst <= limit, f"{what}: off by {worst:.1e}, allowed {limit:.0e}"
