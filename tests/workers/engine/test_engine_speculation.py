"""Drafts change no token, no logprob and no block: however they are cut, rejected or run again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec import structs

from benchmarks.harness.local_engine import Generated, LocalEngine
from cluster.config.cluster import EngineSection
from cluster.config.speculation import SpeculationSection
from cluster.core.errors import ConfigError, PeerLostError
from tests.fakes import TINY_CONFIG, FailingDispatcher, tiny_tensors, write_tiny_checkpoint
from tests.harness.tiers import quick_rows
from tests.paths import DEMO
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from tests.workers.engine.test_engine import load_of, section_with_blocks
from tests.workers.engine.test_engine import tokens as tokens_of
from workers.requests.request import (
    FinishReason,
    Grammar,
    GrammarKind,
    Request,
    SamplingParams,
    TokenOutput,
)
from workers.requests.sequence import SequenceState
from workers.requests.step_header import Grant
from workers.scheduling.scheduler import Scheduler
from workers.speculation.acceptance import Acceptance

pytestmark = pytest.mark.heavy

NGRAM = SpeculationSection(
    speculative_method="ngram", num_speculative_tokens=5, ngram_min=1, ngram_max=3
)
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
SAMPLED = (
    structs.replace(GREEDY, temperature=0.9, seed=5, logprobs=2),
    structs.replace(GREEDY, temperature=0.8, seed=6, top_p=0.9, repetition_penalty=1.3),
    structs.replace(GREEDY, temperature=0.7, seed=7, frequency_penalty=0.4, presence_penalty=-0.3),
    structs.replace(GREEDY, temperature=0.9, seed=8, min_tokens=12, ignore_eos=False, top_k=20),
    structs.replace(GREEDY, temperature=0.6, seed=9, bad_words=((7, 8), (9,), (11, 12, 13))),
    structs.replace(GREEDY, logit_bias=((5, 3.0), (6, 2.0)), logprobs=0, min_p=0.02),
    structs.replace(GREEDY, allowed_token_ids=(20, 21, 22), temperature=1.0, seed=3),
    structs.replace(GREEDY, temperature=1.0, seed=4, stop_token_ids=tuple(range(3, 20))),
)


@pytest.fixture(autouse=True)
def _every_guess_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs, and however often guesses are wrong."""
    monkeypatch.setattr(Acceptance, "num_worthwhile", lambda self, price, most: most)


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Texts of few different tokens that repeat themselves, of 4 to 60 tokens."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = [tuple(rng.randint(3, 30) for _ in range(rng.randint(1, 5))) for _ in range(3)]
        found.append(tuple(t for _ in range(rng.randint(4, 12)) for t in rng.choice(words)))
    return found


def spec(engine: LocalEngine, name: str) -> float:
    return engine.engine.stats()[f"spec_decode_num_{name}_total"]


def plain(results: Sequence[Generated]) -> list[tuple[object, ...]]:
    """All that a client sees of tokens."""
    return [(r.token_ids, r.logprobs, r.prompt_logprobs, r.finish_reason) for r in results]


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize(
    "section",
    [
        EngineSection(),
        EngineSection(max_num_batched_tokens=8, max_num_seqs=8, block_size_tokens=4),
        EngineSection(max_num_seqs=3, block_size_tokens=1),
        EngineSection(block_size_tokens=4, enable_prefix_caching=False),
    ],
)
def test_tokens_and_logprobs_are_those_without_drafts(
    tiny_checkpoint: Path, section: EngineSection, num_micro_batches: int
) -> None:
    texts, each = prompts(8), [*SAMPLED]
    without = LocalEngine(tiny_checkpoint)
    engine = LocalEngine(
        tiny_checkpoint,
        section=section,
        speculation=NGRAM,
        num_micro_batches=num_micro_batches,
    )
    assert engine.is_exact
    for params in (GREEDY, each):
        expected = plain(without.generate(texts, params))
        for _ in range(2):  # the second time with a prefix hit
            assert plain(engine.generate(texts, params)) == expected
    assert 0 < spec(engine, "accepted_tokens") < spec(engine, "draft_tokens")
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_torch_computes_the_same_with_drafts(tiny_checkpoint: Path) -> None:
    """Each row is a decode to the model, so results are exact where a batch changes nothing."""
    texts = prompts(6)
    section = EngineSection(deterministic="on", block_size_tokens=4)
    without = LocalEngine(tiny_checkpoint, section=section, kernels="torch")
    engine = LocalEngine(tiny_checkpoint, section=section, speculation=NGRAM, kernels="torch")
    for params in (GREEDY, SAMPLED[:6]):
        assert plain(engine.generate(texts, params)) == plain(without.generate(texts, params))
    assert spec(engine, "accepted_tokens")


def test_goldens_are_met_token_for_token(golden: Callable[[str], Golden]) -> None:
    for name in ("olmoe-base", "qwen3moe-window-bias-tied", "jetmoe-tied", "olmoe-rope-dynamic"):
        expected = golden(name)
        engine = LocalEngine(expected.path, max_model_len=MAX_MODEL_LEN, speculation=NGRAM)
        params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
        results = engine.generate(expected.prompts, params)
        assert [r.token_ids for r in results] == [expected.greedy(i) for i in range(8)], name
        assert spec(engine, "drafts"), name


def test_preemption_changes_nothing(tiny_checkpoint: Path) -> None:
    texts = prompts(8)
    expected = plain(LocalEngine(tiny_checkpoint).generate(texts, GREEDY))
    section = section_with_blocks(tiny_checkpoint, 30)
    engine = LocalEngine(tiny_checkpoint, section=section, speculation=NGRAM)
    assert plain(engine.generate(texts, GREEDY)) == expected
    assert engine.engine.stats()["num_preemptions_total"] > 0
    assert spec(engine, "accepted_tokens")
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks == 30


def test_choices_of_a_request_have_their_own_drafts(tiny_checkpoint: Path) -> None:
    params = structs.replace(SAMPLED[0], temperature=0.5)
    request = Request(request_id="n", prompt=prompts(1)[0], params=params, n=3)
    expected = LocalEngine(tiny_checkpoint).run([request])
    engine = LocalEngine(tiny_checkpoint, speculation=NGRAM)
    found = engine.run([request])
    assert {key: tokens_of(out) for key, out in found.items()} == {
        key: tokens_of(out) for key, out in expected.items()
    }
    assert spec(engine, "accepted_tokens")


def test_an_output_has_a_logprob_for_each_of_its_tokens(tiny_checkpoint: Path) -> None:
    params = structs.replace(GREEDY, logprobs=1)
    engine = LocalEngine(tiny_checkpoint, speculation=NGRAM)
    request = Request(request_id="a", prompt=prompts(1)[0], params=params)
    outputs = engine.run([request])["a", 0]
    assert max(len(output.token_ids) for output in outputs) > 1
    for output in outputs:
        assert tuple(entry.token_id for entry in output.logprobs) == output.token_ids
    assert len(tokens_of(outputs)) == 40
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_output_ends_at_its_stop_token_though_drafts_go_on(tiny_checkpoint: Path) -> None:
    text = prompts(1)[0]
    without, engine = (
        LocalEngine(tiny_checkpoint, speculation=section) for section in (None, NGRAM)
    )
    whole = without.generate([text], GREEDY)[0].token_ids
    for stop in dict.fromkeys(whole):
        params = structs.replace(GREEDY, stop_token_ids=(stop,))
        result = engine.generate([text], params)[0]
        assert result.token_ids == whole[: whole.index(stop) + 1]
        assert result.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_output_never_has_more_than_max_tokens(tiny_checkpoint: Path, count: int) -> None:
    text = prompts(1)[0]
    params = structs.replace(GREEDY, max_tokens=count)
    expected = LocalEngine(tiny_checkpoint).generate([text], params)
    engine = LocalEngine(tiny_checkpoint, speculation=NGRAM, max_model_len=len(text) + count)
    assert plain(engine.generate([text], params)) == plain(expected)


def test_grammar_goes_on_without_drafts() -> None:
    """Beside a request that has some."""
    texts = prompts(2)
    grammar = Grammar(kind=GrammarKind.REGEX, text="[a-z ]{20,30}")
    each = [structs.replace(GREEDY, grammar=grammar), GREEDY]
    expected = plain(LocalEngine(DEMO).generate(texts, each))
    engine = LocalEngine(DEMO, speculation=NGRAM)
    assert plain(engine.generate(texts, each)) == expected
    assert spec(engine, "accepted_tokens")


@pytest.mark.parametrize("num_micro_batches", quick_rows({2}, [1, 2]))
def test_step_that_is_lost_or_repeated_is_run_again_with_the_same_result(
    tiny_checkpoint: Path, num_micro_batches: int
) -> None:
    texts, each = prompts(4), [*SAMPLED[:3], GREEDY]
    section = EngineSection(max_num_batched_tokens=24, max_num_seqs=8, block_size_tokens=4)
    expected = LocalEngine(tiny_checkpoint, section=section).generate(texts, each)
    engine = LocalEngine(
        tiny_checkpoint,
        section=section,
        speculation=NGRAM,
        num_micro_batches=num_micro_batches,
        wrap=FailingDispatcher,
    )
    failing = engine.dispatcher
    assert isinstance(failing, FailingDispatcher)
    rng = random.Random(3)
    outputs: dict[str, list[TokenOutput]] = {f"{i}": [] for i in range(4)}
    for name, text, params in zip(outputs, texts, each, strict=True):
        engine.engine.add_request(Request(request_id=name, prompt=text, params=params))
    while engine.engine.has_work:
        failing.fail_at = rng.choice((None, *range(4 * num_micro_batches)))
        wanted, before = engine.engine.rows_wanted(), engine.engine.stats()
        try:
            for output in engine.step():
                outputs[output.request_id].append(output)
        except PeerLostError:
            before["steps_abandoned_total"] += 1
            assert (engine.engine.stats(), engine.engine.rows_wanted()) == (before, wanted)
        engine.engine.check_integrity()
    assert failing.num_failures > 5
    assert spec(engine, "accepted_tokens")
    assert [tokens_of(found) for found in outputs.values()] == [r.token_ids for r in expected]


def test_load_counts_every_row_that_ran(tiny_checkpoint: Path) -> None:
    """Rejected ones are computed, too."""
    texts = prompts(3)
    without = LocalEngine(tiny_checkpoint)
    without.generate(texts, GREEDY)
    engine = LocalEngine(tiny_checkpoint, speculation=NGRAM)
    engine.generate(texts, GREEDY)
    rejected = spec(engine, "draft_tokens") - spec(engine, "accepted_tokens")
    assert rejected > 0
    top_k = TINY_CONFIG["num_experts_per_tok"]
    for key, counts in load_of(engine).items():
        assert counts.sum() == load_of(without)[key].sum() + rejected * top_k
    for bank in engine.engine.load.report().banks.values():
        assert bank.prefill.sum() == sum(map(len, texts)) * top_k


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_broken_row_of_a_rejected_draft_harms_nobody(
    prompt_logprobs: int | None, tmp_path: Path
) -> None:
    """Token 95 has no finite embedding: it is drafted after the prompt's, and never drawn."""
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"][95] = float("nan")
    write_tiny_checkpoint(tmp_path, TINY_CONFIG, tensors)
    params = structs.replace(GREEDY, logit_bias=((95, -1e4),), prompt_logprobs=prompt_logprobs)
    text = prompts(1)[0]
    first = LocalEngine(tmp_path).generate([text], params)[0].token_ids
    section = EngineSection(block_size_tokens=4, max_num_seqs=4)
    engine = LocalEngine(tmp_path, section=section, speculation=NGRAM)
    _guess(engine, lambda sequence: (95, first[len(sequence.output)], 95))
    for _ in range(2):
        result = engine.generate([text], params)[0]
        assert result.token_ids == first
    assert spec(engine, "accepted_tokens") == 0
    for layer in engine.engine.cache.layers:
        assert torch.isfinite(layer).all()


def _guess(engine: LocalEngine, guess: Callable[[SequenceState], tuple[int, ...]]) -> None:
    """Use these guesses in place of n-grams."""
    speculator = engine.engine._speculator
    assert speculator is not None
    speculator._guess = (  # type: ignore[method-assign]
        lambda sequence, index: guess(sequence)[
            : sequence.params.max_tokens - len(sequence.output) - 1
        ]
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_drafts_leave_blocks_and_tokens_as_they_are(
    tiny_checkpoint: Path, seed: int
) -> None:
    """Partly right guesses of any length, few blocks, requests that come and are aborted."""
    rng = random.Random(seed)
    texts = prompts(10, seed)
    right = {
        text: result.token_ids
        for text, result in zip(
            texts, LocalEngine(tiny_checkpoint).generate(texts, GREEDY), strict=True
        )
    }
    section = replace(section_with_blocks(tiny_checkpoint, 34), max_num_batched_tokens=20)
    engine = LocalEngine(tiny_checkpoint, section=section, speculation=NGRAM)

    def guess(sequence: SequenceState) -> tuple[int, ...]:
        own, first = right[sequence.request.prompt], len(sequence.output)
        wanted = list(own[first : first + rng.randint(0, 5)])
        if wanted and rng.random() < 0.6:
            wanted[rng.randrange(len(wanted))] = rng.randint(3, 90)
        return tuple(wanted)

    _guess(engine, guess)
    outputs: dict[str, list[TokenOutput]] = {}
    left = list(enumerate(texts))
    aborted = set()
    while left or engine.engine.has_work:
        if left and rng.random() < 0.3:
            number, text = left.pop()
            outputs[str(number)] = []
            engine.engine.add_request(Request(request_id=str(number), prompt=text, params=GREEDY))
        if rng.random() < 0.01 and outputs:
            aborted.add(name := rng.choice(list(outputs)))
            engine.engine.abort(name)
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.engine.check_integrity()
    for number, text in enumerate(texts):
        if str(number) not in aborted:
            assert tokens_of(outputs[str(number)]) == right[text]
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks
    assert spec(engine, "accepted_tokens")


def test_drafts_preempt_nothing(tiny_checkpoint: Path) -> None:
    """With room for the tokens alone, there are no rows of drafts beyond the last block."""
    text = prompts(1)[0]
    need = -(-(len(text) + 39) // 4)
    section = section_with_blocks(tiny_checkpoint, 2 * need)
    engine = LocalEngine(tiny_checkpoint, section=section, speculation=NGRAM)
    expected = LocalEngine(tiny_checkpoint).generate([text], GREEDY)[0].token_ids
    results = engine.generate([text, text[::-1]], GREEDY)
    assert results[0].token_ids == expected
    assert engine.engine.stats()["num_preemptions_total"] == 0


def test_rows_stay_within_the_budget_of_a_step(tiny_checkpoint: Path) -> None:
    section = EngineSection(max_num_batched_tokens=12, max_num_seqs=4)
    engine = LocalEngine(tiny_checkpoint, section=section, speculation=NGRAM)
    for i, text in enumerate(prompts(8)):
        engine.add_request(Request(request_id=str(i), prompt=text, params=GREEDY))
    most = 0
    while engine.engine.has_work:
        wanted = engine.engine.rows_wanted()
        assert wanted.decode_rows + wanted.prefill_rows <= 12
        assert wanted.decode_rows <= 4 + NGRAM.num_speculative_tokens
        most = max(most, wanted.decode_rows)
        engine.step()
    assert most > 4


def test_fewer_rows_than_asked_for_are_used_for_tokens_first(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, speculation=NGRAM)
    for i, text in enumerate(prompts(3)):
        engine.add_request(Request(request_id=str(i), prompt=text, params=GREEDY))
    scheduler: Scheduler = engine.engine._scheduler
    while (wanted := engine.engine.rows_wanted()).decode_rows < 8:
        engine.step()
    assert wanted.prefill_rows == 0
    for granted, rows in ((2, [1, 1]), (3, [1, 1, 1])):
        plan = scheduler.plan(scheduler.intent(), Grant(decode_rows=granted))
        assert [planned.count for planned in plan.rows] == rows
        scheduler.abandon(plan)
    plan = scheduler.plan(scheduler.intent(), Grant(decode_rows=5))
    assert sum(planned.count for planned in plan.rows) == 5
    assert len(plan.rows) == 3
    scheduler.abandon(plan)
    engine.engine.check_integrity()


def test_model_with_recurrent_states_is_refused_by_name(golden: Callable[[str], Golden]) -> None:
    expected = golden("qwen3next-base")
    with pytest.raises(ConfigError, match=r"speculative_method \(ngram\) must be none: .*states"):
        LocalEngine(expected.path, max_model_len=MAX_MODEL_LEN, speculation=NGRAM)


def _draws(engine: LocalEngine, text: tuple[int, ...], seeds: Iterator[int]) -> Counter[int]:
    """Last tokens of many short outputs, each with a seed of its own."""
    each = [
        structs.replace(GREEDY, max_tokens=4, temperature=1.0, top_k=6, seed=next(seeds))
        for _ in range(600)
    ]
    return Counter(r.token_ids[-1] for r in engine.generate([text] * len(each), each))


def test_distribution_of_sampled_tokens_is_kept(tiny_checkpoint: Path) -> None:
    """Chi-square of two samples, with different seeds: they would be equal with the same."""
    text = prompts(1)[0]
    section = EngineSection(max_num_seqs=64, max_num_batched_tokens=512)
    without = LocalEngine(tiny_checkpoint, section=section)
    engine = LocalEngine(tiny_checkpoint, section=section, speculation=NGRAM)
    one = _draws(without, text, iter(range(600)))
    other = _draws(engine, text, iter(range(10_000, 10_600)))
    assert spec(engine, "draft_tokens")
    kinds = [token for token in one | other if one[token] + other[token] >= 10]
    rest = (sum(n for t, n in c.items() if t not in kinds) for c in (one, other))
    pairs = [*((one[token], other[token]) for token in kinds), tuple(rest)]
    pairs = [(a, b) for a, b in pairs if a + b]
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    freedom = len(pairs) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)
