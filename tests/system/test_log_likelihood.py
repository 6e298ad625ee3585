"""Held-out text scored as lm-eval's ``local-completions`` does it, against transformers.

It sends token ids of context and continuation with ``echo``, ``logprobs: 1`` and one new token, and
adds up the continuation's log-probabilities.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.demo_model.corpus import split_corpus
from cluster.launch.model_source import bundled_checkpoint
from gateway.text.tokenizer import load_tokenizer
from tests.gateway.stack import MODEL, Stack, post
from tests.harness.served_stack import stack_over
from tests.paths import ROOT

CORPUS = ROOT / "benchmarks" / "data" / "tinyshakespeare.txt"
HELD_OUT = 0.05
"""Share of the corpus that the bundled model was not trained on."""
CONTEXTS = (1, 1, 64, 127, 200, 255)
"""Tokens of context before each continuation; 1: text that is scored from its beginning."""
WINDOW = 256
"""Tokens of context and continuation."""


def windows() -> list[list[int]]:
    """Token ids from all over the held-out text."""
    tokenizer = load_tokenizer(str(bundled_checkpoint()))
    assert tokenizer is not None
    text = split_corpus(CORPUS.read_text(encoding="utf-8"), HELD_OUT)[1]
    ids = tokenizer.encode(text, False)
    step = (len(ids) - WINDOW) // len(CONTEXTS)
    return [list(ids[i * step : i * step + WINDOW]) for i in range(len(CONTEXTS))]


def by_transformers(prompts: list[list[int]], dtype: str) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether it is the greedy one."""
    command = [
        sys.executable,
        "-m",
        "tests.reference.transformers_scores",
        str(bundled_checkpoint()),
        dtype,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=540,
    )
    found = []
    for context, (scores, is_best) in zip(CONTEXTS, json.loads(done.stdout), strict=True):
        found.append((math.fsum(scores[context - 1 :]), all(is_best[context - 1 :])))
    return found


def as_lm_eval_reads(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    """Its ``parse_logprobs`` of one choice."""
    logprobs = choice["logprobs"]
    scores = logprobs["token_logprobs"][context:-1]
    tops = logprobs["top_logprobs"][context:-1]
    pairs = zip(scores, tops, strict=True)
    return math.fsum(scores), all(score == max(top.values()) for score, top in pairs)


def scored(stack: Stack, prompt: list[int], context: int) -> tuple[float, bool]:
    """One call as it sends it."""
    response = post(
        stack,
        "/v1/completions",
        model=MODEL,
        prompt=[prompt],
        echo=True,
        logprobs=1,
        max_tokens=1,
        temperature=0,
        seed=1234,
    )
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert {len(values) for values in choice["logprobs"].values()} == {len(prompt) + 1}
    assert choice["logprobs"]["token_logprobs"][0] is None
    return as_lm_eval_reads(choice, context)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_held_out_text_is_as_likely_as_with_transformers(dtype: str) -> None:
    prompts = windows()
    want = by_transformers(prompts, dtype)
    with stack_over(bundled_checkpoint(), dtype=dtype) as stack:
        got = [scored(stack, *pair) for pair in zip(prompts, CONTEXTS, strict=True)]
    total, theirs = (math.fsum(score for score, _ in found) for found in (got, want))
    assert total == pytest.approx(theirs, rel=1e-3)
    rel, least = (1e-3, 1e-3) if dtype == "float32" else (2e-2, 0.1)
    for (score, is_greedy), (wanted, is_best) in zip(got, want, strict=True):
        assert score == pytest.approx(wanted, rel=rel, abs=least)
        assert is_greedy is is_best or dtype == "bfloat16"  # which has ties
