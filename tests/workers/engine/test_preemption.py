"""200 requests through a KV pool that holds ten: many are preempted, and no output differs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from benchmarks.harness.local_engine import LocalEngine, block_bytes
from cluster.config.cluster import EngineSection
from tests.reference.exact import exact
from workers.model.loading.config_file import resolve_dtype
from workers.requests.request import Request, SamplingParams

NUM_REQUESTS = 200
BLOCK_SIZE = 2
FULL_LENGTH = 20
"""Tokens of prompt and output of every request."""


def make_requests() -> list[Request]:
    """Short prompts, long outputs; greedy and sampled, some with penalties, two priorities."""
    rng = random.Random(7)
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=1)
    kinds = (
        greedy,
        structs.replace(greedy, temperature=1.0),
        structs.replace(greedy, temperature=0.8, top_p=0.9, frequency_penalty=0.5),
        structs.replace(greedy, temperature=1.2, top_k=20, repetition_penalty=1.2),
    )
    requests = []
    for i in range(NUM_REQUESTS):
        prompt = tuple(rng.randint(3, 95) for _ in range(rng.randint(1, 4)))
        params = structs.replace(kinds[i % 4], max_tokens=FULL_LENGTH - len(prompt), seed=i)
        requests.append(
            Request(request_id=f"r{i}", prompt=prompt, params=params, priority=rng.randint(0, 1))
        )
    return requests


@pytest.mark.parametrize(
    ("dtype", "enable_prefix_caching"),
    [
        ("float32", True),
        pytest.param("float32", False, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_200_requests_through_a_pool_of_ten_equal_their_solo_runs(
    tiny_checkpoint: Path, dtype: str, enable_prefix_caching: bool
) -> None:
    """Tokens and logprobs to the last bit."""
    section = EngineSection(
        block_size_tokens=BLOCK_SIZE,
        deterministic="on",
        enable_prefix_caching=enable_prefix_caching,
    )
    plain = replace(section, enable_prefix_caching=False)
    solo = LocalEngine(tiny_checkpoint, dtype=dtype, section=plain)
    each = block_bytes(solo.config, BLOCK_SIZE, resolve_dtype(dtype, solo.config))
    pool = replace(section, kv_cache_bytes=10 * FULL_LENGTH // BLOCK_SIZE * each)
    crowded = LocalEngine(tiny_checkpoint, dtype=dtype, section=pool)
    requests = make_requests()
    together = crowded.run(requests)
    assert crowded.engine.stats()["num_preemptions_total"] > 100
    for request in requests:
        ((name, alone),) = solo.run([request]).items()
        assert exact(together[name]) == exact(alone), request
    crowded.engine.check_integrity()
    assert crowded.engine.pool.num_free == crowded.engine.pool.num_blocks == 10 * FULL_LENGTH // 2
