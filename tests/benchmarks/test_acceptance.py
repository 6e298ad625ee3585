"""Drafts on given texts are those of the engine, and the edits are what they are called."""

from __future__ import annotations

import pytest

from benchmarks.engine import acceptance
from benchmarks.engine.acceptance import NGRAM, Text, drawn, replay
from benchmarks.engine.held_out import held_out
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.launch.model_source import bundled_checkpoint
from workers.requests.request import SamplingParams

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_replay_has_the_drafts_of_the_engine(temperature: float) -> None:
    """By a clock that stands still the engine keeps to the price that it assumes at first."""
    source = held_out(4 * acceptance.PASSAGE_TOKENS)
    prompts = source.parts(acceptance.PASSAGE_TOKENS)
    texts = drawn(prompts, temperature)
    engine = LocalEngine(
        bundled_checkpoint(),
        section=EngineSection(max_num_seqs=40),  # room for the drafts of all
        speculation=NGRAM,
        clock=lambda: 0.0,
    )
    each = [
        SamplingParams(
            max_tokens=acceptance.NEW_TOKENS, temperature=temperature, seed=i, ignore_eos=True
        )
        for i in range(len(prompts))
    ]
    results = engine.generate(prompts, each)
    assert [result.token_ids for result in results] == [text.output for text in texts]
    stats, found = engine.engine.stats(), replay(texts, 0.3, source.eos)
    assert found.num_drafted == stats["spec_decode_num_draft_tokens_total"] > 0
    assert found.num_accepted == stats["spec_decode_num_accepted_tokens_total"]
    assert found.num_tokens == 4 * (acceptance.NEW_TOKENS - 1)


def test_a_text_that_its_prompt_holds_takes_few_steps() -> None:
    words = list(range(10, 43))
    found = replay([Text(words, words)], 0.02, eos=1)
    assert (found.num_tokens, found.num_accepted) == (32, found.num_drafted)
    assert found.num_steps < 16


def test_edits_are_what_they_are_called() -> None:
    passage = "ANTONIO:\nGo sleep.\nHear us.\n\nALONSO:\nWhat, all?\n\nno name"
    assert acceptance.with_other_speakers(passage) == (
        "ALONSO:\nGo sleep.\nHear us.\n\nANTONIO:\nWhat, all?\n\nno name"
    )
    assert acceptance.every_other_line(passage) == "ANTONIO:\nHear us.\nWhat, all?"


def test_every_text_has_a_row_for_each_price() -> None:
    text = acceptance.section(quick=True)
    assert text.startswith("## Acceptance of n-gram drafts")
    assert sum(line.startswith("| edit: ") for line in text.splitlines()) == 4
    assert text.count("greedy |") == 4
