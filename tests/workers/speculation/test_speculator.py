"""Which guesses are run for a sequence, and what is learned from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from cluster.config.speculation import SpeculationSection
from cluster.core.errors import ConfigError
from workers.requests.request import Grammar, GrammarKind, Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.speculation.speculator import Speculator

EOS = 2
SECTION = SpeculationSection(speculative_method="ngram", num_speculative_tokens=4)
LOOP = (11, 12, 13, 14, 15, 16) * 2


def speculator_of(section: SpeculationSection = SECTION, max_len: int = 1000) -> Speculator:
    speculator = Speculator(section, max_len, (EOS,))
    for _ in range(20):  # rows are nearly free
        for size in (1, 5):
            speculator.observe_step(size, 0, 1.0 + 0.01 * size)
    speculator.plan_step(1)
    return speculator


def sequence_of(
    prompt: Sequence[int] = LOOP,
    params: SamplingParams | None = None,
    output: Sequence[int] = (),
) -> SequenceState:
    request = Request(
        request_id="r", prompt=tuple(prompt), params=params or SamplingParams(max_tokens=100)
    )
    return SequenceState(request, 0, 0, math.inf, output=list(output))


def decode(speculator: Speculator, sequence: SequenceState, *tokens: int) -> tuple[int, ...]:
    """A step that draws these tokens; returns the drafts that it had."""
    drafts = speculator.draft(sequence)
    sequence.output += tokens
    speculator.commit(sequence, drafts, tokens)
    return drafts


def test_drafts_are_what_followed_before() -> None:
    speculator, sequence = speculator_of(), sequence_of(output=(11, 12))
    assert speculator.draft(sequence) == (13, 14, 15, 16)
    assert speculator.draft(sequence) == (13, 14, 15, 16)
    assert decode(speculator, sequence, 13, 14, 15, 16, 11) == (13, 14, 15, 16)
    assert speculator.draft(sequence) == (12, 13, 14, 15)


def test_counters_follow_what_was_accepted() -> None:
    speculator, sequence = speculator_of(), sequence_of(output=(11, 12))
    decode(speculator, sequence, 13, 14, 99)
    stats = speculator.stats()
    assert stats["spec_decode_num_drafts_total"] == 1
    assert stats["spec_decode_num_draft_tokens_total"] == 4
    assert stats["spec_decode_num_accepted_tokens_total"] == 2
    name = "spec_decode_num_accepted_tokens_per_pos_total"
    assert [stats[f'{name}{{position="{i}"}}'] for i in range(4)] == [1, 1, 0, 0]


def test_wrong_guesses_switch_it_off_and_right_ones_on_again() -> None:
    """Guesses that are not run are compared, too."""
    speculator, sequence = speculator_of(), sequence_of(LOOP * 40, output=(11, 12))
    for size in (1, 5) * 20:
        speculator.observe_step(size, 0, 1.0 + 0.5 * size)
    speculator.plan_step(1)
    while speculator.draft(sequence):
        decode(speculator, sequence, 99)
        sequence.output += (11, 12)
    num_withheld = speculator.stats()["spec_decode_num_withheld_drafts_total"]
    cycle = [13, 14, 15, 16, 11, 12]
    for place in range(40):
        if decode(speculator, sequence, cycle[place % 6]):
            break
    assert 0 < place < 30
    assert speculator.stats()["spec_decode_num_withheld_drafts_total"] == num_withheld + place


def test_a_right_guess_that_was_not_run_counts() -> None:
    """At a price of 0.57, which one right guess of two is not worth, and two of three are."""
    speculator = Speculator(SECTION, 1000, (EOS,))
    for size in (1, 5) * 200:
        speculator.observe_step(size, 0, 0.4 + 0.6 * size)
    speculator.plan_step(1)
    assert 0.5 < speculator.stats()["spec_decode_row_price"] < 0.6
    sequence = sequence_of(output=(11, 12))
    assert decode(speculator, sequence, 13) == ()
    assert decode(speculator, sequence, 99) == (14,)


def test_a_draft_of_right_guesses_alone_has_no_wrong_one() -> None:
    """At the price that is assumed at first, 0.3."""
    speculator, sequence = Speculator(SECTION, 1000, (EOS,)), sequence_of(output=(11, 12))
    assert decode(speculator, sequence, 13, 14) == (13,)
    assert speculator.draft(sequence) == (15, 16, 11)


def test_the_first_step_is_one_of_this_rank_alone() -> None:
    speculator = Speculator(SECTION, 1000, (EOS,))
    speculator.plan_step(1)
    speculator.observe_step(5, 0, 1.0)
    speculator.plan_step(1)
    assert speculator.stats()["spec_decode_row_price"] == pytest.approx(0.06 / 0.76)


def test_sequences_of_other_ranks_count() -> None:
    """A step of 24 rows, and 10 sequences elsewhere: with 2 here there are 12 in all."""
    speculator = Speculator(SECTION, 1000, (EOS,))
    for _ in range(3):
        speculator.plan_step(2)
        speculator.observe_step(24, 10, 1.0)
    speculator.plan_step(2)
    assert speculator.stats()["spec_decode_row_price"] == pytest.approx(0.15 / 0.85)


def test_dear_rows_are_not_used() -> None:
    speculator, sequence = speculator_of(), sequence_of(output=(11, 12))
    speculator.plan_step(32)
    for size in (32, 36) * 50:
        speculator.observe_step(size, 0, 0.01 * size)
    speculator.plan_step(32)
    assert speculator.stats()["spec_decode_row_price"] > 0.8
    assert speculator.draft(sequence) == ()


def test_drafts_of_other_ranks_do_not_raise_the_price() -> None:
    """A step takes 10 + rows / 2: with one sequence here and one elsewhere, whatever it drafts."""
    prices = []
    for num_drafts in (0, 8):
        speculator = Speculator(SECTION, 1000, (EOS,))
        for own in (1, 5) * 50:
            speculator.plan_step(1)
            rows = own + 1 + num_drafts
            speculator.observe_step(rows, 1, 10 + 0.5 * rows)
        speculator.plan_step(1)
        prices.append(speculator.stats()["spec_decode_row_price"])
    assert prices[0] == pytest.approx(2 * 0.5 / 11, rel=0.1)
    assert prices[1] == pytest.approx(prices[0], rel=0.1)


def test_few_rows_go_to_the_likeliest_drafts_of_all() -> None:
    speculator = speculator_of()
    equal = [sequence_of(output=(11, 12)) for _ in range(3)]
    doubtful = sequence_of(output=(11, 12))
    decode(speculator, doubtful, 99)
    doubtful.output += (11, 12)
    sequences = [doubtful, *equal]

    def lengths(most: int) -> list[int]:
        return list(map(len, speculator.draft_all(sequences, most)))

    assert lengths(100) == [3, 4, 4, 4]
    assert lengths(7) == [1, 2, 2, 2]
    assert lengths(4) == [1, 1, 1, 1]
    assert lengths(3) == [0, 1, 1, 1]
    assert lengths(0) == [0, 0, 0, 0]


def test_equal_drafts_take_turns() -> None:
    speculator = speculator_of()
    sequences = [sequence_of(output=(11, 12)) for _ in range(3)]
    runs = []
    for _ in range(3):
        speculator.plan_step(3)
        runs.append(list(map(len, speculator.draft_all(sequences, 1))))
    assert sorted(runs) == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_drafts_without_room_are_not_counted_as_withheld() -> None:
    speculator, sequence = speculator_of(), sequence_of(output=(11, 12))
    assert speculator.draft(sequence)
    sequence.output += (13,)
    speculator.commit(sequence, (), (13,))
    assert speculator.stats()["spec_decode_num_withheld_drafts_total"] == 0


@pytest.mark.parametrize(
    ("params", "max_len", "expected"),
    [
        (SamplingParams(max_tokens=5), 1000, (13, 14)),
        (SamplingParams(max_tokens=3), 1000, ()),
        (SamplingParams(max_tokens=100), len(LOOP) + 5, (13, 14)),
        (SamplingParams(max_tokens=100, stop_token_ids=(15,)), 1000, (13, 14)),
    ],
)
def test_drafts_end_before_the_output_must(
    params: SamplingParams, max_len: int, expected: tuple[int, ...]
) -> None:
    """So only the last token of a step may end an output."""
    sequence = sequence_of(params=params, output=(11, 12))
    assert speculator_of(max_len=max_len).draft(sequence) == expected


def test_drafts_end_before_the_end_of_text() -> None:
    sequence = sequence_of((11, 12, 13, EOS, 14), output=(11, 12))
    assert speculator_of().draft(sequence) == (13,)


def test_few_predictions_are_made_where_none_would_be_run() -> None:
    section = SpeculationSection(speculative_method="mtp")
    params = SamplingParams(max_tokens=500)
    speculator, sequence = speculator_of(section), sequence_of(params=params, output=(11,))
    for size in (1, 2) * 200:
        speculator.observe_step(size, 0, 1.0 * size)  # a row costs as much as a step
    speculator.plan_step(1)
    asked = []
    for _ in range(64):
        if speculator.wants_prediction(sequence):
            asked.append(len(sequence.output))
            speculator.note_prediction(sequence, 12)
        assert decode(speculator, sequence, 99) == ()
    assert asked == list(range(8, 65, 8))
    for size in (1, 2) * 200:
        speculator.observe_step(size, 0, 1.0)
    speculator.plan_step(1)
    for _ in range(64):
        speculator.note_prediction(sequence, 12)
        decode(speculator, sequence, 12)
    for _ in range(8):
        assert speculator.wants_prediction(sequence)
        decode(speculator, sequence, 12)
    speculator.note_prediction(sequence, 12)
    assert speculator.draft(sequence) == (12,)


def test_request_with_a_grammar_has_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    grammar = Grammar(kind=GrammarKind.REGEX, text="a*")
    speculator = speculator_of()
    for _ in range(2):
        sequence = sequence_of(params=SamplingParams(grammar=grammar), output=(11, 12))
        assert speculator.draft(sequence) == ()
        assert not speculator.wants_prediction(sequence)
    assert caplog.messages == ["no speculative decoding for requests with a grammar"]


def test_long_prompt_is_indexed_over_several_steps() -> None:
    speculator = speculator_of(max_len=20_000)
    sequence = sequence_of(tuple(range(10, 9010)) + LOOP, output=(11, 12))
    found = []
    for _ in range(4):
        found.append(bool(speculator.draft(sequence)))
        sequence.output += (13, 14, 15, 16, 11, 12)
    assert found == [False, False, True, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speculative_method": "eagle"}, "speculative_method"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"ngram_min": 0}, "ngram_min"),
        ({"ngram_min": 4, "ngram_max": 3}, "ngram_max"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculationSection(**fields)  # type: ignore[arg-type]


def test_rows_of_drafts_are_none_without_a_method() -> None:
    assert SpeculationSection().max_draft_rows == 0
    assert SECTION.max_draft_rows == 4
