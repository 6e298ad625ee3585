"""Log-probabilities of the prompt: a teacher's run over what was generated says the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from workers.requests.request import Request, SamplingParams, TokenLogprob, TokenOutput

Entries = tuple[TokenLogprob | None, ...]


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randint(3, 95) for _ in range(length))


def entries_of(outputs: list[TokenOutput]) -> Entries:
    """The prompt's entries, which must come once and first."""
    assert all(o.prompt_logprobs is None for o in outputs[1:])
    assert outputs[0].prompt_logprobs is not None
    return tuple(outputs[0].prompt_logprobs.entries())


def assert_same(found: Entries, expected: Entries) -> None:
    """Equal but for rounding; the first of a prompt has none."""
    assert len(found) == len(expected)
    for entry, other in zip(found, expected, strict=True):
        if other is None:
            assert entry is None
            continue
        assert entry is not None
        assert (entry.token_id, entry.rank) == (other.token_id, other.rank)
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [t for t, _ in entry.top] == [t for t, _ in other.top]
        assert [v for _, v in entry.top] == pytest.approx([v for _, v in other.top], abs=1e-4)


SECTIONS = {
    "whole": EngineSection(),
    "chunks of 7": EngineSection(max_num_batched_tokens=7, max_num_seqs=7),
    "chunks of 1": EngineSection(max_num_batched_tokens=1, max_num_seqs=1, block_size_tokens=4),
    "small blocks": EngineSection(block_size_tokens=1),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_scoring_what_was_generated_gives_its_logprobs(tiny_checkpoint: Path, name: str) -> None:
    prompt = prompt_of(40)
    engine = LocalEngine(tiny_checkpoint, section=SECTIONS[name])
    drawing = SamplingParams(max_tokens=30, seed=3, logprobs=2, ignore_eos=True)
    drawn = engine.generate([prompt], drawing)[0]
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=2)
    whole = engine.generate([prompt + drawn.token_ids], scoring)[0].prompt_logprobs
    assert whole is not None
    assert whole[0] is None
    assert_same(whole[len(prompt) :], drawn.logprobs)


@pytest.mark.parametrize("name", SECTIONS)
def test_chunks_blocks_and_choices_change_nothing(tiny_checkpoint: Path, name: str) -> None:
    prompt = prompt_of(75, seed=2)
    params = SamplingParams(max_tokens=3, seed=1, prompt_logprobs=2, ignore_eos=True)
    expected = LocalEngine(tiny_checkpoint).generate([prompt], params)[0].prompt_logprobs
    assert expected is not None
    engine = LocalEngine(tiny_checkpoint, section=SECTIONS[name])
    outputs = engine.run([Request(request_id="a", prompt=prompt, params=params, n=3)])
    assert_same(entries_of(outputs["a", 0]), expected)
    for choice in (1, 2):
        assert all(o.prompt_logprobs is None for o in outputs["a", choice])
        assert sum(len(o.token_ids) for o in outputs["a", choice]) == 3


def test_a_known_prefix_is_scored_all_the_same(tiny_checkpoint: Path) -> None:
    """Cached blocks hold no logits: such a request computes its whole prompt."""
    prompt = prompt_of(64, seed=4)
    section = EngineSection(block_size_tokens=4, enable_prefix_caching=True)
    engine = LocalEngine(tiny_checkpoint, section=section)
    params = SamplingParams(max_tokens=2, seed=1, prompt_logprobs=1, ignore_eos=True)
    first, again = (engine.generate([prompt], params)[0].prompt_logprobs for _ in range(2))
    assert first is not None
    assert again is not None
    assert_same(again, first)


@pytest.mark.parametrize("num_top", [0, 1, 5, 200])
def test_as_many_alternatives_as_asked_for(tiny_checkpoint: Path, num_top: int) -> None:
    engine = LocalEngine(tiny_checkpoint)
    params = SamplingParams(max_tokens=0, prompt_logprobs=num_top)
    entries = engine.generate([prompt_of(9)], params)[0].prompt_logprobs
    assert entries is not None
    for entry in entries[1:]:
        assert entry is not None
        assert len(entry.top) == min(num_top, engine.config.vocab_size)
        values = [v for _, v in entry.top]
        assert values == sorted(values, reverse=True)
        assert entry.rank == 1 + sum(v > entry.logprob for v in values) or entry.rank > num_top
