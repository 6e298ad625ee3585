"""Dynamic RoPE, where cutting, caching and resuming would change the rotation of keys.

Row p of a request is rotated for n = max(length of its prompt as first sent, p + 1). The goldens
have a context of 48 tokens, which their factor stretches to 192, and prompts of 1 to 100 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from msgspec import structs

from benchmarks.harness.local_engine import LocalEngine, block_bytes
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.config.cluster import EngineSection
from cluster.core.errors import ContextLengthError
from tests.harness.golden_clusters import GREEDY, requests
from tests.reference.goldens import NUM_PROMPTS, Golden
from workers.requests.request import Request, SamplingParams

AnyGolden = Callable[[str], Golden]
VARIANTS = ("olmoe-rope-dynamic", "dots1-relu-dynamic-fp16", "jetmoe-relu-dynamic")
CONTEXT, FACTOR = 48, 4
BLOCKS = EngineSection(block_size_tokens=4)
LONGEST = NUM_PROMPTS - 1

each_family = pytest.mark.parametrize("variant", VARIANTS)


def make_engine(golden: Golden, section: EngineSection) -> LocalEngine:
    return LocalEngine(golden.path, dtype="float32", section=section)


def check_all(engine: LocalEngine, golden: Golden) -> None:
    """Every prompt in one batch has transformers' tokens, which it gives to each alone."""
    for i, result in enumerate(engine.generate(golden.prompts, GREEDY)):
        assert result.token_ids == golden.greedy(i), f"prompt {i}"


@each_family
def test_the_context_is_stretched_by_the_factor(golden: AnyGolden, variant: str) -> None:
    engine = make_engine(golden(variant), BLOCKS)
    assert engine.engine.max_model_len == FACTOR * CONTEXT
    with pytest.raises(ContextLengthError, match=f"length is {FACTOR * CONTEXT} tokens"):
        engine.generate([(7,) * (FACTOR * CONTEXT)], SamplingParams(max_tokens=1))


@each_family
@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_chunks_are_rotated_for_the_whole_prompt(
    golden: AnyGolden, variant: str, num_rows: int
) -> None:
    section = replace(BLOCKS, max_num_batched_tokens=max(num_rows, 8), max_num_seqs=8)
    engine = make_engine(golden(variant), section)
    if num_rows == 1:  # one row of one prompt in every step
        wanted = golden(variant).prompt(LONGEST)
        found = make_engine(
            golden(variant), replace(BLOCKS, max_num_batched_tokens=1, max_num_seqs=1)
        ).generate([wanted], GREEDY)
        assert found[0].token_ids == golden(variant).greedy(LONGEST)
    check_all(engine, golden(variant))


@each_family
def test_cached_prefixes_are_shared_by_equal_rotations_only(
    golden: AnyGolden, variant: str
) -> None:
    """Beginnings of the longest prompt leave blocks that its own keys differ from."""
    expected = golden(variant)
    longest = expected.prompt(LONGEST)
    engine = make_engine(expected, BLOCKS)
    hits = "prefix_cache_hits_total"
    for length in (40, 60, 80):
        engine.generate([longest[:length]], GREEDY)
    assert engine.engine.stats()[hits] == 0, "40 is plain, 60 and 80 are rotated for themselves"
    check_all(engine, expected)
    before = engine.engine.stats()[hits]
    check_all(engine, expected)
    assert engine.engine.stats()[hits] - before == sum(
        (len(prompt) - 1) // 4 * 4 for prompt in expected.prompts
    )
    # What decodes wrote was rotated for their own positions: a longer prompt must not find it.
    output = expected.greedy(LONGEST)
    turn = (*longest, *output[:20])
    without = make_engine(expected, replace(BLOCKS, enable_prefix_caching=False))
    assert (
        engine.generate([turn], GREEDY)[0].token_ids
        == without.generate([turn], GREEDY)[0].token_ids
    )


@each_family
@pytest.mark.parametrize("has_cache", [False, True])
def test_a_preempted_sequence_continues_as_before(
    golden: AnyGolden, variant: str, has_cache: bool
) -> None:
    expected = golden(variant)
    config = make_engine(expected, BLOCKS).config
    section = replace(
        BLOCKS,
        max_num_seqs=6,
        max_num_batched_tokens=33,
        kv_cache_bytes=50 * block_bytes(config, 4, torch.float32),
        enable_prefix_caching=has_cache,
    )
    engine = make_engine(expected, section)
    check_all(engine, expected)
    assert engine.engine.stats()["num_preemptions_total"] > 0
    engine.engine.check_integrity()


def moved(expected: Golden) -> list[Request]:
    """All prompts as another worker sends them on, some tokens later."""
    return [
        structs.replace(request, attempt=1, output_so_far=(expected.greedy(i)[: 3 + 4 * i],))
        for i, request in enumerate(requests(expected))
    ]


@each_family
def test_a_request_that_was_sent_again_goes_on_as_before(golden: AnyGolden, variant: str) -> None:
    """Its prompt is what it was; the output so far does not belong to the prompt."""
    expected = golden(variant)
    engine = make_engine(expected, replace(BLOCKS, max_num_batched_tokens=16, max_num_seqs=4))
    found = engine.run(moved(expected))
    for i in range(NUM_PROMPTS):
        tokens = tuple(token for output in found[f"p{i}", 0] for token in output.token_ids)
        assert tokens == expected.greedy(i)[3 + 4 * i :], f"prompt {i}"


@each_family
def test_workers_do_the_same(golden: AnyGolden, variant: str) -> None:
    """Chunks, few blocks, two micro-batches and requests that were sent again, all at once."""
    expected = golden(variant)
    config = make_engine(expected, BLOCKS).config
    options = {
        "block_size_tokens": 4,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 6,
        "num_micro_batches": 2,
        "kv_cache_bytes": 50 * block_bytes(config, 4, torch.float32),
    }
    made = make_config(expected.path, 2, 2, dtype="float32", engine=options)
    with serving(ThreadCluster(made)) as cluster:
        first = cluster.answers(requests(expected))
        again = cluster.answers(
            [
                structs.replace(request, request_id=f"{request.request_id}-2")
                for request in moved(expected)
            ]
        )
        for i in range(NUM_PROMPTS):
            assert tuple(first[f"p{i}"].tokens[0]) == expected.greedy(i), f"prompt {i}"
            assert tuple(again[f"p{i}-2"].tokens[0]) == expected.greedy(i), f"prompt {i} again"
            assert again[f"p{i}-2"].outputs[0].index == 3 + 4 * i
        assert cluster.blocks_in_use() == 0
