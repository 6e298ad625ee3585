"""Text as it comes from tokens, with the vocabularies that are really served."""

from __future__ import annotations

import lzma
import random
import unicodedata

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from gateway.text.detokenizer import (
    ChoiceText,
    StopStringFinder,
    align_offsets,
    locate_tokens,
    make_detokenizer,
)
from gateway.text.tokenizer import Tokenizer
from tests.harness.tiers import quick_rows
from tests.paths import ROOT

pytestmark = pytest.mark.heavy

SCRIPTS = (
    (0x20, 0x7F),
    (0xA1, 0x17F),
    (0x391, 0x3C9),
    (0x4E00, 0x4FFF),
    (0x1F600, 0x1F64F),
    (0x300, 0x320),
)
"""First and last characters: ASCII, Latin, Greek, Chinese, emoji, combining marks."""
UNKNOWN_IDS = 24
"""Ids that a checkpoint's vocabulary has beyond its tokenizer."""


def _demo() -> tokenizers.Tokenizer:
    path = ROOT / "workers" / "demo" / "checkpoint" / "tokenizer.json"
    return tokenizers.Tokenizer.from_file(str(path))


def _olmoe() -> tokenizers.Tokenizer:
    with lzma.open(ROOT / "tests" / "data" / "olmoe-tokenizer.json.xz", "rt") as file:
        return tokenizers.Tokenizer.from_str(file.read())


TOKENIZERS = {"demo": (_demo, 1024), "olmoe": (_olmoe, 50280)}


@pytest.fixture(scope="module", params=TOKENIZERS)
def vocabulary(request: pytest.FixtureRequest) -> tuple[Tokenizer, int]:
    """A tokenizer and the number of its tokens."""
    make, size = TOKENIZERS[request.param]
    return Tokenizer(make()), size


def random_text(rng: random.Random, length: int) -> str:
    """Characters of all lengths in UTF-8, composed where they can be."""
    ranges = [rng.choice(SCRIPTS) for _ in range(length)]
    return unicodedata.normalize("NFC", "".join(chr(rng.randint(*pair)) for pair in ranges))


def random_ids(rng: random.Random, vocabulary: tuple[Tokenizer, int]) -> list[int]:
    """Any tokens, or mostly such that are no whole characters."""
    tokenizer, size = vocabulary
    broken = [t for t in range(size) if "\ufffd" in tokenizer.token_text(t)][:300]
    count = rng.randrange(1, 40)
    if rng.random() < 0.5:
        return [rng.randrange(size + UNKNOWN_IDS) for _ in range(count)]
    return [rng.choice(broken) if rng.random() < 0.9 else rng.randrange(size) for _ in range(count)]


@pytest.mark.parametrize("skip_special_tokens", quick_rows({True}, [True, False]))
def test_pieces_are_final_and_add_up_to_the_whole(
    vocabulary: tuple[Tokenizer, int], skip_special_tokens: bool
) -> None:
    """What was shown is never taken back, so no half character was ever shown."""
    tokenizer = vocabulary[0]
    for seed in range(200):
        ids = random_ids(random.Random(seed), vocabulary)
        whole = tokenizer.decode(ids, skip_special_tokens)
        detokenizer, shown = make_detokenizer(tokenizer, skip_special_tokens), ""
        for token in ids:
            shown += detokenizer.feed(token)
            assert whole.startswith(shown), seed
        assert shown + detokenizer.flush() == whole


def test_text_has_no_broken_character_anywhere(vocabulary: tuple[Tokenizer, int]) -> None:
    tokenizer = vocabulary[0]
    for seed in range(60):
        text = random_text(random.Random(seed), 30)
        detokenizer = make_detokenizer(tokenizer)
        pieces = [detokenizer.feed(token) for token in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert detokenizer.flush() == ""


def test_offsets_count_the_characters_before_a_token(vocabulary: tuple[Tokenizer, int]) -> None:
    """A token that begins inside of a character has the offset of that character."""
    tokenizer = vocabulary[0]
    for seed in range(60):
        text = random_text(random.Random(seed), 20)
        ids = tokenizer.encode(text)
        ends = [len(text[: count + 1].encode()) for count in range(len(text))]
        placed_text, placed = locate_tokens(make_detokenizer(tokenizer), ids, ())
        assert placed_text == text
        assert [token.token_id for token in placed] == list(ids)
        num_bytes = 0
        for token in placed:
            assert token.text_offset == sum(end <= num_bytes for end in ends)
            num_bytes += len(tokenizer.token_bytes(token.token_id))


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 7])
def test_stop_strings_are_found_across_tokens(
    vocabulary: tuple[Tokenizer, int], include: bool, min_tokens: int
) -> None:
    """Against a search in the whole text, token by token."""
    tokenizer = vocabulary[0]
    found = 0
    for seed in range(150):
        rng = random.Random(seed)
        text = random_text(rng, 25)
        ids = tokenizer.encode(text)
        stops = []
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(text))
            stops.append(text[start : start + rng.randint(1, 6)])
        choice = ChoiceText(
            make_detokenizer(tokenizer), StopStringFinder(stops, include), min_tokens
        )
        shown, stopped = "", None
        for token in ids:
            stopped = choice.feed(token, None)
            shown += choice.take(always=stopped is not None)[0]
            if stopped is not None:
                break
        else:
            choice.finish()
            shown += choice.take(always=True)[0]
        expected = _expected(tokenizer, ids, stops, include, min_tokens)
        assert (shown, stopped, choice.num_tokens) == expected, seed
        found += stopped is not None
    assert found > 50


def _expected(
    tokenizer: Tokenizer, ids: tuple[int, ...], stops: list[str], include: bool, min_tokens: int
) -> tuple[str, str | None, int]:
    """Text, stop string and tokens that count: the first whose text ends a match decides."""
    detokenizer, text = make_detokenizer(tokenizer), ""
    for count, token in enumerate(ids, 1):
        before, text = len(text), text + detokenizer.feed(token)
        if count <= min_tokens:
            continue
        matches = [
            (start + len(stop), start, stop)
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > before
        ]
        if matches:
            end, start, stop = min(matches)
            return text[: end if include else start], stop, count
    return text, None, len(ids)


def test_a_stop_string_inside_of_one_character_s_tokens(
    vocabulary: tuple[Tokenizer, int],
) -> None:
    """The match ends only when the character's last byte is there."""
    tokenizer = vocabulary[0]
    text = "a\U0001f601b"
    ids = tokenizer.encode(text)
    choice = ChoiceText(make_detokenizer(tokenizer), StopStringFinder(["\U0001f601"]), 0)
    stopped = [choice.feed(token, None) for token in ids[:-1]]
    assert stopped[-1] == "\U0001f601"
    assert set(stopped[:-1]) <= {None}
    assert choice.take(always=True)[0] == "a"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_texts_have_the_tokens_of_short_ones(name: str, special: bool) -> None:
    backend, text = TOKENIZERS[name][0](), random_text(random.Random(3), 10_000)
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(text, special)
    assert ids == tuple(backend.encode(text, add_special_tokens=special).ids)
    assert len(ids) > 2048
    assert tokenizer.decode(ids) == backend.decode(list(ids)) == text


def sentencepiece_like() -> Tokenizer:
    """As in Llama's files: spaces are marks, one of which is put before every text."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "h", "i", "a", "hi", "\u2581hi", "\u2581a", "\u2581\u2581"]
    merges = [("h", "i"), ("\u2581", "hi"), ("\u2581", "a"), ("\u2581", "\u2581")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.add_special_tokens(["<s>"])
    return Tokenizer(made)


@pytest.mark.parametrize("skips_special", [True, False])
@pytest.mark.parametrize(
    ("text", "offsets"),
    [
        ("hi a", [0, 0, 2]),
        (" hi a", [0, 0, 0, 3]),
        ("  hi", [0, 0, 1]),
        ("   a", [0, 0, 1, 2]),
        (" ", [0, 0]),
        ("\u00e9 a", [0, 0, 0, 0, 1]),
    ],
)
def test_an_echoed_text_keeps_its_spaces_and_its_tokens_their_places(
    text: str, offsets: list[int], skips_special: bool
) -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode(text)
    decoded, tokens = locate_tokens(make_detokenizer(tokenizer, skips_special), ids, ())
    assert decoded == tokenizer.decode(ids, skips_special)
    if skips_special:
        assert decoded == text
    found, placed = align_offsets(text, decoded, tokens)
    assert found == text
    assert [token.text_offset for token in placed] == offsets


def metaspace(adds_bos: bool) -> Tokenizer:
    """As in Mistral's newer files: a mark is put before texts that do not begin with a space."""
    pieces = ["<unk>", "<s>", "\u2581", "h", "i", "a", "hi", "\u2581hi", "\u2581a", "\u2581\u2581"]
    merges = [("h", "i"), ("\u2581", "hi"), ("\u2581", "a"), ("\u2581", "\u2581")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    made.add_special_tokens(["<s>"])
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return Tokenizer(made)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(
    ("text", "offsets"),
    [
        ("hi a", [0, 2]),
        (" hi a", [0, 3]),
        ("  hi", [0, 1]),
        ("   hi a", [0, 2, 5]),
        (" hi hi  a", [0, 3, 6, 7]),
        (" ", [0]),
    ],
)
def test_spaces_that_a_decoder_leaves_out_have_places(
    text: str, offsets: list[int], adds_bos: bool
) -> None:
    tokenizer = metaspace(adds_bos)
    decoded, tokens = locate_tokens(make_detokenizer(tokenizer, False), tokenizer.encode(text), ())
    found, placed = align_offsets(text, decoded, tokens)
    assert found == text
    assert [token.text_offset for token in placed] == [0] * adds_bos + offsets
