"""Text from tokens: whole characters, stop strings, offsets."""

from __future__ import annotations

import random

import pytest
import tokenizers
from tokenizers import decoders, models

from gateway.text.detokenizer import (
    ByteDetokenizer,
    ChoiceText,
    StopStringFinder,
    WindowDetokenizer,
    locate_tokens,
    make_detokenizer,
)
from gateway.text.tokenizer import Tokenizer
from tests.gateway.fakes import BACKEND, EOS_ID, VOCAB_SIZE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def _byte_ids(text: str) -> list[int]:
    by_byte = {TOKENIZER.token_bytes(token): token for token in range(256)}
    return [by_byte[bytes([byte])] for byte in text.encode()]


def sentencepiece_like() -> tuple[Tokenizer, dict[str, int]]:
    """A tokenizer with byte fallback and a leading space, as Llama's, and its tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "\u2581hello", "\u2581world", "ly", "h"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend), backend.get_vocab()


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_random_tokens_give_the_text_of_the_whole_list(skip_special_tokens: bool) -> None:
    source = random.Random(1)
    for _ in range(300):
        ids = [source.randrange(VOCAB_SIZE) for _ in range(source.randrange(1, 40))]
        detokenizer = ByteDetokenizer(TOKENIZER, skip_special_tokens)
        pieces = [detokenizer.feed(token) for token in ids]
        text = "".join(pieces) + detokenizer.flush()
        assert text == TOKENIZER.decode(ids, skip_special_tokens)


def test_no_piece_holds_half_a_character() -> None:
    text = "Grüße, 世界 👩‍👩‍👧 end"
    detokenizer = make_detokenizer(TOKENIZER)
    pieces = [detokenizer.feed(token) for token in _byte_ids(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.flush() == ""


def test_a_tail_that_stays_incomplete_is_one_broken_character_at_the_end() -> None:
    detokenizer = make_detokenizer(TOKENIZER)
    pieces = [detokenizer.feed(token) for token in _byte_ids("a世")[:-1]]
    assert "".join(pieces) == "a"
    assert detokenizer.flush() == "\ufffd"


def test_other_vocabularies_decode_through_a_window() -> None:
    tokenizer, vocab = sentencepiece_like()
    assert not tokenizer.is_byte_level
    ids = [vocab["\u2581hello"], vocab["\u2581world"], vocab["ly"], vocab["\u2581"]]
    ids += [1 + byte for byte in "é世".encode()] + [vocab["\u2581hello"]]
    detokenizer = make_detokenizer(tokenizer)
    assert isinstance(detokenizer, WindowDetokenizer)
    pieces = [detokenizer.feed(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


def test_a_window_keeps_the_space_after_the_prompt() -> None:
    tokenizer, vocab = sentencepiece_like()
    detokenizer = make_detokenizer(tokenizer, before=[vocab["\u2581hello"]])
    assert detokenizer.feed(vocab["<s>"]) == ""
    assert detokenizer.feed(vocab["\u2581world"]) == " world"


def test_a_window_waits_for_a_character_for_eight_tokens_at_most() -> None:
    tokenizer, vocab = sentencepiece_like()
    detokenizer = make_detokenizer(tokenizer)
    pieces = [detokenizer.feed(vocab["<0x80>"]) for _ in range(8)]
    assert pieces[:7] == [""] * 7
    assert set(pieces[7]) == {"\ufffd"}


def test_token_bytes_of_a_vocabulary_with_byte_fallback() -> None:
    tokenizer, vocab = sentencepiece_like()
    assert tokenizer.token_bytes(vocab["<0xE4>"]) == b"\xe4"
    assert tokenizer.token_bytes(vocab["\u2581hello"]) == b" hello"
    assert tokenizer.token_bytes(10_000) == b""


def _stop(text: str, strings: list[str], cuts: list[int], include: bool = False) -> str:
    """What is shown of ``text`` when it comes in pieces."""
    stop = StopStringFinder(strings, include)
    shown = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, match = stop.feed(text[start:end])
        shown += piece
        if match is not None:
            return shown
    return shown + stop.flush()


def test_stop_strings_do_not_depend_on_the_pieces() -> None:
    source = random.Random(2)
    for _ in range(500):
        text = "".join(source.choice("ab") for _ in range(source.randrange(1, 14)))
        strings = [
            "".join(source.choice("ab") for _ in range(source.randrange(1, 5))) for _ in range(3)
        ]
        cuts = sorted(source.sample(range(len(text) + 1), k=source.randrange(len(text) + 1)))
        include = source.random() < 0.5
        ends = [(text.find(s) + len(s), text.find(s), s) for s in strings if s in text]
        expected = text
        if ends:
            end, start, _ = min(ends)
            expected = text[: end if include else start]
        assert _stop(text, strings, cuts, include) == expected


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    stop = StopStringFinder(["END"])
    assert stop.feed("some E") == ("some ", None)
    assert stop.held == "E"
    assert stop.feed("N") == ("", None)
    assert stop.feed("d") == ("ENd", None)
    assert stop.feed("EN") == ("", None)
    assert stop.flush() == "EN"


def test_text_that_could_not_stop_does_not_stop_later() -> None:
    stop = StopStringFinder(["abc", "b"])
    assert stop.feed("ab", can_stop=False) == ("", None)
    assert stop.feed("x") == ("abx", None)
    assert stop.feed("ab", can_stop=False) == ("", None)
    assert stop.feed("c") == ("", "abc")
    assert StopStringFinder(["ab"]).feed("xab", can_stop=False) == ("xab", None)


def test_a_stop_string_before_min_tokens_is_ordinary_text() -> None:
    choice = ChoiceText(make_detokenizer(TOKENIZER), StopStringFinder(["b"]), min_tokens=2)
    stopped = [choice.feed(token, None) for token in _byte_ids("abxb")]
    assert stopped == [None, None, None, "b"]
    assert choice.take()[0] == "abx"
    assert choice.num_tokens == 4


def test_tokens_wait_for_their_text() -> None:
    choice = ChoiceText(make_detokenizer(TOKENIZER), StopStringFinder([]), min_tokens=0)
    first, second, third = _byte_ids("世")
    choice.feed(first, None)
    assert choice.take() == ("", ())
    choice.feed(second, None)
    choice.feed(third, None)
    text, tokens = choice.take()
    assert text == "世"
    assert [token.token_id for token in tokens] == [first, second, third]
    assert [token.text_offset for token in tokens] == [0, 0, 0]


def test_a_hidden_token_counts_and_has_no_text() -> None:
    choice = ChoiceText(make_detokenizer(TOKENIZER, False), StopStringFinder([]), min_tokens=0)
    choice.feed(_byte_ids("a")[0], None)
    choice.feed(EOS_ID, None, hidden=True)
    choice.finish()
    text, tokens = choice.take(always=True)
    assert (text, len(tokens), choice.num_tokens) == ("a", 2, 2)


def test_placed_tokens_line_up_with_the_text() -> None:
    ids = BACKEND.encode("hello world").ids
    text, tokens = locate_tokens(make_detokenizer(TOKENIZER), ids, ())
    assert text == "hello world"
    starts = [token.text_offset for token in tokens]
    pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert pieces == [TOKENIZER.token_text(token) for token in ids]


def test_the_end_shows_what_was_held_back() -> None:
    choice = ChoiceText(make_detokenizer(TOKENIZER), StopStringFinder(["ab"]), min_tokens=0)
    assert choice.feed(_byte_ids("a")[0], None) is None
    assert choice.take() == ("", ())
    choice.finish()
    text, tokens = choice.take()
    assert (text, len(tokens)) == ("a", 1)


def test_the_end_shows_half_a_character() -> None:
    choice = ChoiceText(make_detokenizer(TOKENIZER), StopStringFinder([]), min_tokens=0)
    choice.feed(_byte_ids("世")[0], None)
    choice.finish()
    assert choice.take()[0] == "\ufffd"


def test_a_stop_string_at_the_end_shows_nothing_after_it() -> None:
    choice = ChoiceText(make_detokenizer(TOKENIZER), StopStringFinder(["\ufffd"]), min_tokens=0)
    choice.feed(_byte_ids("世")[0], None)
    choice.finish()
    assert choice.take(always=True)[0] == ""


def test_without_a_detokenizer_tokens_come_and_no_text() -> None:
    choice = ChoiceText(None, StopStringFinder(["a"]), min_tokens=0)
    assert choice.feed(_byte_ids("a")[0], None) is None
    assert [len(part) for part in choice.take()] == [0, 1]
    choice.finish()
    assert choice.take(always=True) == ("", ())
    assert choice.num_tokens == 1


@pytest.mark.parametrize(("is_included", "text"), [(False, "a"), (True, "ab")])
def test_the_text_of_a_stop_token_is_shown_only_if_asked_for(is_included: bool, text: str) -> None:
    first, stop = _byte_ids("ab")
    finder = StopStringFinder([], is_included)
    choice = ChoiceText(make_detokenizer(TOKENIZER), finder, 0, None, [stop])
    assert (choice.feed(first, None), choice.feed(stop, None)) == (None, stop)
    assert choice.take()[0] == text
