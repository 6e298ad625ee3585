"""Grammars against plain references: what may come next is what some whole text begins with."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.text.tokenizer import load_tokenizer
from tests.paths import DATA, DEMO
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import Grammar, GrammarKind, GrammarPart
from workers.sampling.grammar import CompiledGrammar
from workers.sampling.grammar_compiler import GrammarCompiler

pytestmark = pytest.mark.heavy

CONFIG = Checkpoint(DEMO).config
VOCAB = CONFIG.vocab_size
EOS = CONFIG.eos_token_ids[0]
TOKENIZER = load_tokenizer(str(DEMO))
assert TOKENIZER is not None
TOKEN_BYTES = [TOKENIZER.token_bytes(token) for token in range(VOCAB)]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """For the bundled checkpoint."""
    return GrammarCompiler(DEMO, VOCAB, CONFIG.eos_token_ids)


def regex(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.REGEX, text=text)


def schema(value: object) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(value))


def allowed_after(compiled: CompiledGrammar, output: Sequence[int]) -> set[int]:
    """Tokens that may come next, by a state that is made anew."""
    return set(compiled.start(output).mask().allowed.nonzero().flatten().tolist())


def begins(texts: Sequence[bytes], prefix: bytes) -> bool:
    return any(text.startswith(prefix) for text in texts)


def is_forced(texts: Sequence[bytes], prefix: bytes) -> bool:
    """Only one byte can follow: the parser then asks for the token the tokenizer would use."""
    following = {text[len(prefix) :][:1] for text in texts if text.startswith(prefix)}
    return len(following) == 1


FINITE: list[tuple[Grammar, list[str]]] = [
    (Grammar(kind=GrammarKind.CHOICE, text='["yes", "no", "not now"]'), ["yes", "no", "not now"]),
    (
        Grammar(kind=GrammarKind.CHOICE, text=json.dumps(['"é\n\\', "\U0001f600", "\t\x01", ""])),
        ['"é\n\\', "\U0001f600", "\t\x01", ""],
    ),
    (
        Grammar(
            kind=GrammarKind.CHOICE,
            text=json.dumps(['"é\n\\', "\U0001f600"], ensure_ascii=False),
        ),
        ['"é\n\\', "\U0001f600"],
    ),
    (
        regex("(the|then|them)( king)?!{0,2}"),
        [
            f"{a}{b}{c}"
            for a in ("the", "then", "them")
            for b in ("", " king")
            for c in ("", "!", "!!")
        ],
    ),
    (
        Grammar(kind=GrammarKind.LARK, text='start: a " " a\na: "lord" | "lady"\n'),
        ["lord lord", "lord lady", "lady lord", "lady lady"],
    ),
    (schema({"enum": ["a", 1, None]}), ['"a"', "1", "null"]),
]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A compiler, and what its tokens stand for."""

    compiler: GrammarCompiler
    token_bytes: list[bytes]
    eos: int


@pytest.fixture(scope="module", params=["demo", "olmoe"])
def vocabulary(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Vocabulary:
    """Both vocabularies; special tokens have no text."""
    folder, size, eos = DEMO, VOCAB, EOS
    if request.param == "olmoe":
        folder, size, eos = tmp_path_factory.mktemp("olmoe"), 50304, 50279
        packed = DATA / "olmoe-tokenizer.json.xz"
        (folder / "tokenizer.json").write_bytes(lzma.decompress(packed.read_bytes()))
    known = load_tokenizer(str(folder))
    assert known is not None
    words = [b"" if known.is_special(t) else known.token_bytes(t) for t in range(size)]
    return Vocabulary(GrammarCompiler(folder, size, (eos,)), words, eos)


@pytest.mark.parametrize("place", range(len(FINITE)))
def test_masks_are_the_beginnings_of_the_language(vocabulary: Vocabulary, place: int) -> None:
    """A walk along random tokens: allowed are exactly those that lead to some whole text."""
    grammar, texts = FINITE[place]
    whole = [text.encode() for text in texts]
    words, eos = vocabulary.token_bytes, vocabulary.eos
    parts = {t: b for t, b in enumerate(words) if b and any(b in text for text in whole)}
    compiled = vocabulary.compiler.compile(grammar)
    for seed in range(8):
        rng = random.Random(seed)
        output: list[int] = []
        while True:
            so_far = b"".join(words[t] for t in output)
            expected = {t for t, b in parts.items() if begins(whole, so_far + b)}
            if so_far in whole:
                expected.add(eos)
            allowed = allowed_after(compiled, output)
            if is_forced(whole, so_far):
                assert allowed, so_far
                assert allowed <= expected, so_far
            else:
                assert allowed == expected, so_far
            token = rng.choice(sorted(allowed))
            if token == eos:
                break
            output.append(token)
            if compiled.start(output).is_complete:
                break
        assert b"".join(words[t] for t in output) in whole


SPACES = ("", " ", "\t ", "\n", "\r\n\t ", "\n" + " " * 32, "\n" + " " * 33, "\n\n", " " * 9)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, SPACES[:6]),
        ({"x-guidance": {"whitespace_flexible": False}}, SPACES[:1]),
        ({"x-guidance": {"whitespace_flexible": True}}, SPACES),
    ],
)
def test_white_space_in_json_has_an_end(
    compiler: GrammarCompiler, options: dict[str, Any], allowed: Sequence[str]
) -> None:
    single = {b: t for t, b in enumerate(TOKEN_BYTES) if len(b) == 1}
    compiled = compiler.compile(schema({"type": "array", "items": {"const": 7}, **options}))
    for space in SPACES:
        tokens = [single[bytes([byte])] for byte in f"[{space}7]".encode()]
        if space in allowed:
            assert compiled.start(tokens).is_complete
        else:
            with pytest.raises(RequestError):
                compiled.start(tokens)


def test_large_schemas_can_be_followed(vocabulary: Vocabulary) -> None:
    """Every property may come next: many parser items at one place."""
    properties = {f"p{i}": {"type": ["string", "integer", "null"]} for i in range(500)}
    compiled = vocabulary.compiler.compile(schema({"type": "object", "properties": properties}))
    rng, state = random.Random(1), compiled.start()
    for _ in range(40):
        allowed = state.mask().allowed.nonzero().flatten().tolist()
        assert allowed, state.error
        state.advance(rng.choice([t for t in allowed if t != vocabulary.eos] or allowed))
        if state.is_complete:
            break


def test_a_state_is_a_function_of_the_output_alone(compiler: GrammarCompiler) -> None:
    """Masks that are asked for never, often or on another thread, and a replay, are the same."""
    grammars = [
        schema(
            {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "string"}}}
        ),
        regex("(a|ab)(c|bcd)(d*)"),
        Grammar(kind=GrammarKind.LARK, text='start: "(" start ")" | /[a-z ]*/\n'),
    ]
    pool = ThreadPoolExecutor(1)
    for grammar in grammars:
        compiled = compiler.compile(grammar)
        for seed in range(5):
            rng = random.Random(seed)
            live, blind, ahead = (compiled.start() for _ in range(3))
            output = list[int]()
            for _ in range(30):
                for _ in range(2):
                    ahead.prepare(pool)
                first = live.mask().allowed.clone()
                assert torch.equal(live.mask().allowed, first)
                assert set(first.nonzero().flatten().tolist()) == allowed_after(compiled, output)
                tokens = set(first.nonzero().flatten().tolist()) - {EOS}
                if not tokens:
                    break
                token = rng.choice(sorted(tokens))
                if len(output) % 2:
                    assert torch.equal(ahead.mask().allowed, first)
                output.append(token)
                replayed = compiled.start(output)
                for state in (live, blind, ahead):
                    state.advance(token)
                assert live.is_complete == blind.is_complete == replayed.is_complete
                assert live.is_complete == ahead.is_complete
            for state in (blind, ahead):
                assert torch.equal(live.mask().allowed, state.mask().allowed)


def test_a_lexer_that_others_have_filled_up_changes_nothing() -> None:
    """States share a lexer; one that reaches its limit is given up, and each goes on alone."""
    grammar = regex("[a-m]{1,40}(foo|[a-z]{3,20}z){2,9}")
    roomy = GrammarCompiler(DEMO, VOCAB, CONFIG.eos_token_ids)
    tight = GrammarCompiler(DEMO, VOCAB, CONFIG.eos_token_ids, max_lexer_states=250)
    expected, compiled = roomy.compile(grammar), tight.compile(grammar)
    walks = [(random.Random(seed), expected.start(), compiled.start()) for seed in range(12)]
    outputs: list[list[int]] = [[] for _ in walks]
    for _ in range(25):
        for (rng, right, found), output in zip(walks, outputs, strict=True):
            mask = right.mask().allowed
            assert torch.equal(found.mask().allowed, mask), found.error
            tokens = mask.nonzero().flatten().tolist()
            token = rng.choice([t for t in tokens if t != EOS] or tokens)
            if not output or output[-1] != EOS:
                output.append(token)
                right.advance(token)
                found.advance(token)
    assert compiled.has_failed
    assert tight.cached(grammar) is None
    again = tight.compile(grammar)
    assert again is not compiled
    for (_, right, _), output in zip(walks, outputs, strict=True):
        assert torch.equal(again.start(output).mask().allowed, right.mask().allowed)
        assert torch.equal(compiled.start(output).mask().allowed, right.mask().allowed)


def test_a_grammar_that_counts_tokens_is_replayed_with_its_masks(
    compiler: GrammarCompiler,
) -> None:
    text = "start: t /!/\nt[max_tokens=3]: /[a-z]*/\n"
    compiled = compiler.compile(Grammar(kind=GrammarKind.LARK, text=text))
    (a,) = [t for t, b in enumerate(TOKEN_BYTES) if b == b"a"]
    live = compiled.start()
    for count in range(4):
        assert torch.equal(compiled.start([a] * count).mask().allowed, live.mask().allowed)
        assert bool(live.mask().allowed[a]) is (count < 3)
        live.advance(a)


def test_states_of_one_grammar_do_not_share(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(regex("ab?c?"))
    (a,) = [t for t, b in enumerate(TOKEN_BYTES) if b == b"a"]
    first, second = compiled.start(), compiled.start()
    first.advance(a)
    assert bool(second.mask().allowed[a])
    assert not bool(first.mask().allowed[a])


def test_the_end_is_allowed_exactly_where_the_grammar_accepts(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(regex("a{2,3}"))
    (a,) = [t for t, b in enumerate(TOKEN_BYTES) if b == b"a"]
    ends = [bool(compiled.start([a] * n).mask().allowed[EOS]) for n in range(4)]
    assert ends == [False, False, True, True]
    complete = [compiled.start([a] * n).is_complete for n in range(4)]
    assert complete == [False, False, False, True]
    assert [compiled.start([a] * n).mask().must_end for n in range(4)] == complete


def test_the_end_itself_completes(compiler: GrammarCompiler) -> None:
    state = compiler.compile(regex("a+")).start()
    (a,) = [t for t, b in enumerate(TOKEN_BYTES) if b == b"a"]
    state.advance(a)
    assert not state.is_complete
    state.advance(EOS)
    assert state.is_complete
    assert state.error is None


def test_an_empty_language_element_must_end_at_once(compiler: GrammarCompiler) -> None:
    mask = compiler.compile(Grammar(kind=GrammarKind.CHOICE, text='[""]')).start().mask()
    assert mask.must_end
    assert mask.allowed.nonzero().flatten().tolist() == [EOS]


def test_a_token_against_the_grammar_leaves_nothing(compiler: GrammarCompiler) -> None:
    state = compiler.compile(regex("a")).start()
    state.advance(EOS)
    assert state.error is not None
    assert not state.is_complete
    assert not bool(state.mask().allowed.any())


def test_output_against_the_grammar_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match="output_so_far"):
        compiler.compile(regex("a")).start([EOS])


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (regex("(unclosed"), "unclosed group"),
        (regex(r"[^\s\S]"), "cannot be used"),
        (regex("(" * 20_000 + ")" * 20_000), "invalid regex"),
        (regex("(a1)" + "{3}" * 50), "too much work"),
        (Grammar(kind=GrammarKind.LARK, text="start: missing\n"), 'unknown name: "missing"'),
        (Grammar(kind=GrammarKind.LARK, text="start: " + "(" * 10_000), "nested"),
        (schema({"type": "bogus"}), "bogus"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (
            schema({"allOf": [{"oneOf": [{"minimum": i}, {"type": "null"}]} for i in range(40)]}),
            "too large",
        ),
        (
            Grammar(
                kind=GrammarKind.LARK,
                text="start: "
                + " | ".join(f"T{i}" for i in range(1000))
                + "\n"
                + "\n".join(f"T{i}: /\\w+{i}\\w*/" for i in range(1000)),
            ),
            "cannot be used",
        ),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused(
    compiler: GrammarCompiler, grammar: Grammar, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        compiler.compile(grammar)
    assert caught.value.param == grammar.field
    assert len(caught.value.message) < 500
    assert "\n" not in caught.value.message


def test_equal_grammars_are_compiled_once_and_old_ones_go(compiler: GrammarCompiler) -> None:
    small = GrammarCompiler(DEMO, VOCAB, CONFIG.eos_token_ids, cache_size=2)
    first = small.compile(regex("a"))
    assert small.compile(regex("a")) is first
    small.compile(regex("b"))
    assert small.cached(regex("a")) is first  # used again: "b" is the oldest
    small.compile(regex("c"))
    assert small.cached(regex("b")) is None
    assert small.cached(regex("a")) is first


@pytest.mark.parametrize(
    "options",
    [
        {"item_separator": " , ", "key_separator": " : "},
        {"whitespace_pattern": "[ ]+"},
        {"whitespace_flexible": "yes"},
        ["lenient"],
    ],
)
def test_options_of_a_schema_that_are_not_known_are_refused(
    compiler: GrammarCompiler, options: Any
) -> None:
    with pytest.raises(RequestError, match="x-guidance may hold"):
        compiler.compile(schema({"type": "object", "x-guidance": options}))


@pytest.mark.parametrize("ignored", ["/ +/", '" "', "/[ ]{1,3}/"])
def test_what_a_grammar_ignores_may_begin_its_words(
    compiler: GrammarCompiler, ignored: str
) -> None:
    """llguidance would look for a forced text without end here."""
    text = f'start: "x" (" y" | / z+/) "!"\n%ignore {ignored}\n'
    compiled = compiler.compile(Grammar(kind=GrammarKind.LARK, text=text))
    for seed in range(20):
        rng, state = random.Random(seed), compiled.start()
        for _ in range(20):
            allowed = state.mask().allowed.nonzero().flatten().tolist()
            assert allowed, state.error
            state.advance(rng.choice(allowed))
            if state.is_complete:
                break


def test_the_tokenizer_can_be_read_ahead(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    compiler = GrammarCompiler(tmp_path, VOCAB, CONFIG.eos_token_ids)
    compiler.prepare()
    (tmp_path / "tokenizer.json").unlink()
    compiler.compile(regex("a"))
    GrammarCompiler(tmp_path, VOCAB, (1,)).prepare()  # without one there is nothing to do


def test_without_a_tokenizer_there_is_no_structured_output(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedParameterError, match="no tokenizer"):
        GrammarCompiler(tmp_path, VOCAB, (1,)).compile(regex("a"))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UnsupportedParameterError, match="this model's tokenizer"):
        GrammarCompiler(tmp_path, VOCAB, (1,)).compile(regex("a"))


def test_ids_beyond_the_tokenizer_are_never_allowed() -> None:
    """Checkpoints pad their vocabulary."""
    mask = GrammarCompiler(DEMO, VOCAB + 40, (EOS,)).compile(regex("(?s:.*)")).start().mask()
    assert len(mask.allowed) == VOCAB + 40
    assert not bool(mask.allowed[VOCAB:].any())
    assert int(mask.allowed.sum()) > VOCAB // 2


def test_tenants_share_no_compiled_grammar(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(regex("tenants?"), "one")
    assert compiler.cached(regex("tenants?"), "one") is compiled
    assert compiler.cached(regex("tenants?"), "two") is None
    assert compiler.compile(regex("tenants?"), "two") is not compiled


def test_the_grammars_of_one_tenant_do_not_displace_those_of_another() -> None:
    small = GrammarCompiler(DEMO, VOCAB, CONFIG.eos_token_ids, cache_size=3)
    small.compile(regex("rare"), "one")
    for text in "abcde":
        small.compile(regex(text), "two")
    assert small.cached(regex("rare"), "one") is not None
    assert [small.cached(regex(t), "two") is not None for t in "cde"] == [False, True, True]


def parts_of(*fallbacks: str | None) -> tuple[GrammarPart, ...]:
    """Of the rules ``a_0``, ``a_1`` and so on."""
    return tuple(
        GrammarPart(rule=f"a_{place}", label=f"tool {place}", fallback=fallback)
        for place, fallback in enumerate(fallbacks)
    )


UNSATISFIABLE = '%json {"type": "string", "minLength": 5, "maxLength": 2}'
TWO_RULES = "start: a_0 | a_1\na_0: %s\na_1: %s\n"


def test_only_parts_that_do_not_compile_are_weakened(compiler: GrammarCompiler) -> None:
    text = TWO_RULES % (UNSATISFIABLE, '%json {"const": 1}')
    parts = parts_of('"x"', '"y"')
    compiled = compiler.compile(Grammar(kind=GrammarKind.LARK, text=text, parts=parts))
    starts = {TOKEN_BYTES[token][:1] for token in allowed_after(compiled, ())}
    assert starts == {b"x", b"1"}
    assert compiled.compile_again() is not None, "it compiles again as it did"


def test_a_part_without_a_fallback_is_named(compiler: GrammarCompiler) -> None:
    text = TWO_RULES % ('"x"', UNSATISFIABLE)
    grammar = Grammar(kind=GrammarKind.LARK, text=text, field="tools", parts=parts_of('"z"', None))
    with pytest.raises(RequestError, match=r"^tool 1 cannot be used as a grammar"):
        compiler.compile(grammar)
