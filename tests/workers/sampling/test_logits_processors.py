"""Penalties, bias and masks, each alone and all together, against the plain reference."""

from __future__ import annotations

import random

import pytest
import torch
from msgspec import structs
from torch import Tensor

from tests.paths import DEMO
from tests.workers.sampling.sampling_reference import (
    assert_drawn_from,
    distribution,
    masked,
    penalized,
    sample,
)
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import Grammar, GrammarKind, Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.sampling.grammar import GrammarState
from workers.sampling.grammar_compiler import GrammarCompiler
from workers.sampling.logits_processors import (
    BadWords,
    LogitsProcessors,
    SamplingRow,
    apply_processors,
)

pytestmark = pytest.mark.heavy

NUM_DRAWS = 3000
VOCAB = 12
EOS = (1,)
PROMPT = (2, 3, 3, 4)
OUTPUT = (4, 5, 5, 6)
NO_PENALTY = SamplingParams()


def logits_of(seed: int, vocab_size: int = VOCAB) -> Tensor:
    """One row [V] that no token rules."""
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 1.5


def processors_of(
    params: SamplingParams, output: tuple[int, ...] = OUTPUT, grammar: GrammarState | None = None
) -> LogitsProcessors:
    """Those of a sequence with ``PROMPT`` and an output."""
    request = Request(request_id="r", prompt=PROMPT, params=params)
    sequence = SequenceState(request, choice=0, arrival=0, deadline=0.0, output=list(output))
    return LogitsProcessors(sequence, EOS, grammar)


def row_of(params: SamplingParams, grammar: GrammarState | None = None) -> SamplingRow:
    """What the engine would draw the next token with, after ``PROMPT`` and ``OUTPUT``."""
    return processors_of(params, grammar=grammar).row()


def draws(logits: Tensor, row: SamplingRow) -> list[int]:
    """Many tokens of one row, each with its own randomness."""
    rows = [structs.replace(row, index=index) for index in range(NUM_DRAWS)]
    return [drawn.token for drawn in sample(logits.expand(NUM_DRAWS, -1), rows)]


ALONE = {
    "repetition": SamplingParams(repetition_penalty=1.8),
    "repetition below 1": SamplingParams(repetition_penalty=0.6),
    "frequency": SamplingParams(frequency_penalty=0.9),
    "frequency below 0": SamplingParams(frequency_penalty=-0.6),
    "presence": SamplingParams(presence_penalty=1.5),
    "presence below 0": SamplingParams(presence_penalty=-1.2),
    "bias": SamplingParams(logit_bias=((0, 2.0), (5, -3.0), (7, 0.5))),
    "bias without end": SamplingParams(logit_bias=((0, -100.0),)),
    "allowed": SamplingParams(allowed_token_ids=(0, 1, 7, 9)),
    "bad words": SamplingParams(bad_words=((7,), (6, 8), (5, 6, 9), (5, 10), (6, 5, 5, 6, 11))),
    "min_tokens": SamplingParams(min_tokens=5),
    "min_tokens reached": SamplingParams(min_tokens=4),
    "min_tokens and ignore_eos": SamplingParams(min_tokens=5, ignore_eos=True),
    "min_tokens and stop ids": SamplingParams(min_tokens=9, stop_token_ids=(0, 8)),
    "stop ids": SamplingParams(stop_token_ids=(0, 8)),
}
TOGETHER = SamplingParams(
    temperature=0.8,
    top_k=7,
    top_p=0.97,
    min_p=0.02,
    repetition_penalty=1.4,
    frequency_penalty=0.4,
    presence_penalty=-0.3,
    logit_bias=((3, 1.5), (9, 4.0), (10, -2.0)),
    allowed_token_ids=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    bad_words=((6, 8), (9,)),
    min_tokens=20,
    stop_token_ids=(2,),
)
CASES = {**ALONE, "together": TOGETHER}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_reference(name: str) -> None:
    seed = list(CASES).index(name) + 1
    params = structs.replace(CASES[name], seed=seed)
    logits = logits_of(seed)
    expected = penalized(logits.tolist(), params, PROMPT, OUTPUT)
    expected = masked(expected, params, OUTPUT, EOS)
    assert_drawn_from(draws(logits, row_of(params)), distribution(expected, params))


@pytest.mark.parametrize("name", CASES)
def test_rows_behind_drafts_are_those_of_an_output_with_them(name: str) -> None:
    params, drafts = CASES[name], (6, 8, 6, 0, 11)
    rows = processors_of(params).rows(drafts)
    logits = logits_of(3).expand(len(rows), -1)
    found = apply_processors(logits, rows)
    assert len(rows) == len(drafts) + 1
    for count, values in enumerate(found):
        alone = processors_of(params, (*OUTPUT, *drafts[:count])).row()
        assert rows[count].index == alone.index
        assert torch.equal(values, apply_processors(logits[:1], [alone])[0].float())


@pytest.mark.parametrize("seed", range(20))
def test_random_rules_give_the_logits_of_the_reference(seed: int) -> None:
    rng = random.Random(seed)

    def some(most: int) -> tuple[int, ...]:
        return tuple(rng.sample(range(VOCAB), rng.randint(1, most)))

    words = tuple(
        tuple(rng.choice(OUTPUT) for _ in range(rng.randint(0, 3))) + some(1)
        for _ in range(rng.randint(0, 6))
    )
    params = SamplingParams(
        repetition_penalty=rng.choice((1.0, 0.5, 2.0)),
        frequency_penalty=rng.choice((0.0, -2.0, 1.0)),
        presence_penalty=rng.choice((0.0, -1.0, 2.0)),
        logit_bias=tuple((t, rng.uniform(-100, 100)) for t in sorted(some(4))),
        allowed_token_ids=rng.choice(((), tuple(sorted(some(VOCAB))))),
        bad_words=words,
        min_tokens=rng.choice((0, 4, 5)),
        stop_token_ids=some(2),
        ignore_eos=rng.random() < 0.5,
    )
    logits = logits_of(seed)
    expected = penalized(logits.tolist(), params, PROMPT, OUTPUT)
    expected = masked(expected, params, OUTPUT, EOS)
    before = logits.clone()
    (found,) = apply_processors(logits.unsqueeze(0), [row_of(params)])
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)
    assert torch.equal(logits, before)


def test_rows_without_rules_do_not_even_copy_the_logits() -> None:
    logits = torch.stack([logits_of(1), logits_of(2)])
    plain = SamplingParams(seed=1, top_p=0.9, top_k=3, temperature=0.5, logprobs=1)
    assert apply_processors(logits, [row_of(plain), row_of(SamplingParams())]) is logits


def test_rules_of_one_row_leave_the_others_alone() -> None:
    logits = torch.stack([logits_of(1), logits_of(2)])
    rows = [row_of(NO_PENALTY), row_of(ALONE["allowed"])]
    found = apply_processors(logits, rows)
    assert torch.equal(found[0], logits[0])
    assert not torch.equal(found[1], logits[1])


def test_bad_words_end_where_the_output_has_begun_them() -> None:
    words = BadWords([(4, 5), (5, 5), (7,), (4, 5, 6)])
    assert words.banned([]) == (7,)
    assert words.banned([4]) == (7, 5)
    assert set(words.banned([4, 5])) == {7, 5, 6}
    assert set(words.banned([3, 5])) == {7, 5}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    config = Checkpoint(DEMO).config
    return GrammarCompiler(DEMO, config.vocab_size, config.eos_token_ids)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.7, top_p=0.9),
        SamplingParams(frequency_penalty=-1.5, logit_bias=((70, 2.0),), min_tokens=7),
        SamplingParams(bad_words=((71,), (6, 72)), ignore_eos=True),
    ],
)
def test_grammar_masks_compose_with_all_else(
    compiler: GrammarCompiler, params: SamplingParams
) -> None:
    """The state is that of another output than the penalties', which only this test can do."""
    compiled = compiler.compile(Grammar(kind=GrammarKind.REGEX, text="[a-e]{0,9}"))
    follows = set(compiled.start().mask().allowed.nonzero().flatten().tolist())
    params = structs.replace(params, seed=8)
    logits = logits_of(8, vocab_size=1024)
    expected = penalized(logits.tolist(), params, PROMPT, OUTPUT)
    expected = masked(expected, params, OUTPUT, EOS, follows)
    if params.ignore_eos:
        expected[EOS[0]] = -float("inf")  # it would end the text, which has not to end yet
    tokens = draws(logits, row_of(params, compiled.start()))
    assert set(tokens) <= follows
    assert_drawn_from(tokens, distribution(expected, params))


def test_a_complete_grammar_overrules_every_mask(compiler: GrammarCompiler) -> None:
    state = compiler.compile(Grammar(kind=GrammarKind.CHOICE, text='[""]')).start()
    params = SamplingParams(min_tokens=9, allowed_token_ids=(7,), bad_words=(EOS,), ignore_eos=True)
    row = row_of(params, state)
    assert [d.token for d in sample(logits_of(1, 1024).unsqueeze(0), [row])] == [EOS[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_named_tokens_are_reported_in_their_order(dtype: torch.dtype) -> None:
    logits = logits_of(3).to(dtype)
    raw = torch.log_softmax(logits.float(), -1)
    named = structs.replace(NO_PENALTY, logprobs=3, logprob_token_ids=(9, 2, 5), temperature=0.0)
    best = structs.replace(NO_PENALTY, logprobs=2, temperature=0.0)
    first, second = sample(logits.expand(2, -1), [row_of(named), row_of(best)])
    assert first.logprob is not None
    assert [t for t, _ in first.logprob.top] == [9, 2, 5]
    assert [v for _, v in first.logprob.top] == pytest.approx(raw[[9, 2, 5]].tolist(), abs=1e-5)
    assert first.logprob.logprob == pytest.approx(raw.max().item(), abs=1e-5)
    assert second.logprob is not None
    assert [t for t, _ in second.logprob.top] == raw.topk(2).indices.tolist()


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0.0, True), (9e-6, True), (1e-5, False)])
def test_a_temperature_that_is_nearly_0_takes_the_best_token(
    temperature: float, is_greedy: bool
) -> None:
    params = SamplingParams(temperature=temperature)
    assert SamplingRow(params=params, choice=0, index=0).is_greedy == is_greedy
