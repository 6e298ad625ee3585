"""Logits, log-probabilities of prompts and greedy answers are those of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.config.cluster import EngineSection
from cluster.config.speculation import SpeculationSection
from tests.real_model.maker import FAMILIES
from tests.real_model.reference import TOLERANCE, Reference
from tests.reference.parity import record
from workers.requests.request import Request, SamplingParams, TokenOutput

QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "Who wrote Romeo and Juliet?",
    "What is 7 times 8?",
    "Name three colors of the rainbow.",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a haiku about autumn.",
    "Translate 'good morning' into Spanish.",
    "What is photosynthesis?",
    "Explain gravity to a child.",
    "Write a Python function that adds two numbers.",
    "What is the largest planet in the solar system?",
    "List the days of the week.",
    "What does DNA stand for?",
    "Give me a recipe with tomatoes.",
    "How many legs does a spider have?",
    "Tell me a short story about a dragon.",
    "What is the difference between a virus and a bacterium?",
    "Say something nice in French.",
)
KV_BYTES = 256 << 20
NGRAM = SpeculationSection(
    speculative_method="ngram", num_speculative_tokens=4, ngram_min=1, ngram_max=3
)
GREEDY = SamplingParams(max_tokens=48, temperature=0.0)
WINDOW = 1024

Outputs = dict[str, list[TokenOutput]]
Serve = Callable[[Path, Sequence[Request]], Outputs]


def locally(folder: Path, requests: Sequence[Request], drafts: SpeculationSection) -> Outputs:
    section = EngineSection(kv_cache_bytes=KV_BYTES)
    engine = LocalEngine(folder, dtype="float32", section=section, speculation=drafts)
    return {name: outputs for (name, _), outputs in engine.run(requests).items()}


def in_cluster(folder: Path, requests: Sequence[Request], drafts: SpeculationSection) -> Outputs:
    config = make_config(folder, 1, 2, dtype="float32", engine={"kv_cache_bytes": KV_BYTES})
    with serving(ThreadCluster(replace(config, speculation=drafts))) as cluster:
        return {name: result.outputs for name, result in cluster.answers(requests).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drafts", [SpeculationSection(), NGRAM], ids=["plain", "drafts"])
@pytest.mark.parametrize("serve", [locally, in_cluster])
def test_answers_and_scores_are_those_of_the_dense_model(
    reference: Reference,
    family: str,
    drafts: SpeculationSection,
    serve: Callable[[Path, Sequence[Request], SpeculationSection], Outputs],
) -> None:
    document = reference.document(1488 + WINDOW)
    prompts = {question: reference.ask(question) for question in QUESTIONS}
    prompts["document"] = document[:1488]
    requests = [Request(request_id=n, prompt=p, params=GREEDY) for n, p in prompts.items()]
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
    scored = Request(request_id="scored", prompt=document[1488:], params=scoring)
    found = serve(reference.folders[family], [*requests, scored], drafts)
    for name, prompt in prompts.items():
        answer = [token for output in found[name] for token in output.token_ids]
        reference.check_greedy(prompt, answer)
        is_cut = len(answer) == GREEDY.max_tokens
        assert is_cut or answer[-1] == reference.tokenizer.eos_token_id
    (output,) = found["scored"]
    assert output.prompt_logprobs is not None
    entries = output.prompt_logprobs.entries()
    scores = torch.tensor([entry.logprob for entry in entries if entry is not None])
    expected = reference.logprobs(scored.prompt)
    torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dense_model(reference: Reference, family: str) -> None:
    engine = LocalEngine(reference.folders[family], dtype="float32")
    prompt = reference.document(WINDOW)
    seen = record(engine, prompt, SamplingParams(max_tokens=1, temperature=0.0))
    found = engine.logits(seen.hidden_states[-1])
    torch.testing.assert_close(found, reference.logits(prompt), rtol=0, atol=TOLERANCE)
