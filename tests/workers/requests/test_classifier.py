"""Sequence classification: the pooled position, and JetMoE's classes against transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.config.cluster import EngineSection
from cluster.core.errors import RequestError
from tests.reference.goldens import CLASSIFIERS, NUM_PROMPTS, Golden, golden_path, load_golden
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.classifier import pooled_position
from workers.requests.request import Request, SamplingParams

BATCHES = ("right_padded", "left_padded", "right_padded_no_mask", "pad_as_text")
"""Inputs of ``jetmoe-seqcls`` with pad tokens."""


def test_position() -> None:
    assert pooled_position([5, 6, 7], None) == 2
    assert pooled_position([5, 6, 0, 0], 0) == 1
    assert pooled_position([0, 5, 0, 6], 0) == 3
    assert pooled_position([0, 0], 0) == 0


@pytest.mark.parametrize("variant", CLASSIFIERS)
def test_logits_of_prompts_equal_golden(variant: str) -> None:
    expected = load_golden(variant)
    section = EngineSection(max_num_seqs=6, max_num_batched_tokens=33, block_size_tokens=4)
    engine = LocalEngine(expected.path, dtype="float32", section=section)
    prompts = expected.prompts
    alone = [engine.classify([prompt])[0] for prompt in prompts]
    together = engine.classify(prompts)  # in chunks, and partly from the prefix cache
    for i in range(NUM_PROMPTS):
        want = expected.tensors[f"p{i}.logits"].tolist()
        assert alone[i] == pytest.approx(want, abs=5e-4), f"p{i}"
        assert together[i] == pytest.approx(want, abs=5e-4), f"p{i}"


@pytest.mark.parametrize("batch", BATCHES)
def test_pad_tokens_move_the_position(batch: str) -> None:
    expected = load_golden("jetmoe-seqcls")
    engine = LocalEngine(expected.path, dtype="float32")
    tensors = expected.tensors
    ids = tensors[f"{batch}.input_ids"]
    is_left = batch == "left_padded"
    mask = tensors[f"{batch}.attention_mask"] if is_left else torch.ones_like(ids)
    prompts = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
    for got, want in zip(engine.classify(prompts), tensors[f"{batch}.logits"], strict=True):
        assert got == pytest.approx(want.tolist(), abs=5e-4)


def test_a_classifier_does_not_generate() -> None:
    engine = LocalEngine(golden_path("jetmoe-seqcls", "jetmoe"), dtype="float32")
    with pytest.raises(RequestError, match=r"max_tokens \(1\) must be 0: the model is a sequence"):
        engine.generate([[7, 8]], SamplingParams(max_tokens=1))
    with pytest.raises(RequestError, match="prompt_logprobs must not be set"):
        engine.generate([[7, 8]], SamplingParams(max_tokens=0, prompt_logprobs=1))


def test_labels_come_from_the_checkpoint() -> None:
    config = Checkpoint(golden_path("jetmoe-seqcls", "jetmoe")).config
    assert config.labels == ("negative", "neutral", "positive")
    assert config.pad_token_id == 0
    config = Checkpoint(golden_path("jetmoe-seqcls-nopad", "jetmoe")).config
    assert (config.labels, config.problem_type) == (("score",), "regression")
    assert config.pad_token_id is None


def test_workers_classify(golden: Callable[[str], Golden]) -> None:
    expected = golden("jetmoe-seqcls")
    config = make_config(expected.path, 2, 3, dtype="float32")
    params = SamplingParams(max_tokens=0)
    asked = [
        Request(request_id=f"p{i}", prompt=(*prompt, 0, 0), params=params)
        for i, prompt in enumerate(expected.prompts)
    ]
    with serving(ThreadCluster(config)) as cluster:
        for rank in range(2):
            stream = cluster.stream(rank)
            for request in asked:
                stream.send(request)
            results = stream.collect(asked)
            stream.close()
            for i in range(NUM_PROMPTS):
                got = results[f"p{i}"].outputs[-1].class_logits
                want = expected.tensors[f"p{i}.logits"].tolist()
                assert got == pytest.approx(want, abs=5e-4), f"p{i}"
