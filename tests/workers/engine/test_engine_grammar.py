"""Grammars and masks in the engine: outputs that follow them, also where steps fail."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from benchmarks.harness.local_engine import LocalEngine, block_bytes
from cluster.config.cluster import EngineSection
from cluster.core.errors import PeerLostError
from gateway.text.tokenizer import load_tokenizer
from tests.fakes import FailingDispatcher
from tests.paths import DEMO
from workers.requests.request import (
    FinishReason,
    Grammar,
    GrammarKind,
    Request,
    SamplingParams,
    TokenOutput,
)
from workers.sampling.grammar import GrammarState

pytestmark = pytest.mark.heavy

_LOADED = load_tokenizer(str(DEMO))
assert _LOADED is not None
TOKENIZER = _LOADED
PROMPT = TOKENIZER.encode("ROMEO:")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "mood": {"enum": ["merry", "sad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(SCHEMA))


def regex(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.REGEX, text=text)


def choice(*texts: str) -> Grammar:
    return Grammar(kind=GrammarKind.CHOICE, text=json.dumps(texts))


def following(grammar: Grammar, **params: object) -> SamplingParams:
    """Parameters of a request that follows a grammar."""
    base = SamplingParams(max_tokens=80, seed=3, grammar=grammar)
    return replace(base, **params)


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    """The bundled model in float32."""
    return LocalEngine(DEMO, dtype="float32")


def text_of(token_ids: tuple[int, ...]) -> str:
    return TOKENIZER.decode(token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
def test_json_follows_its_schema(engine: LocalEngine, temperature: float) -> None:
    for seed in range(4):
        params = following(JSON, seed=seed, temperature=temperature)
        (result,) = engine.generate([PROMPT], params)
        assert result.finish_reason is FinishReason.STOP
        value = json.loads(text_of(result.token_ids))
        assert list(value) == ["name", "age", "mood"]
        assert len(value["name"]) <= 12
        assert 0 <= value["age"] <= 99
        assert value["mood"] in ("merry", "sad")


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (regex("[A-Z][a-z]{2,6}( [0-9]{2})?"), "[A-Z][a-z]{2,6}( [0-9]{2})?"),
        (choice("To be", "not to be", "that is"), "To be|not to be|that is"),
        (
            Grammar(kind=GrammarKind.LARK, text='start: "(" (start | "x") ")"\n'),
            r"\(+x?\)+",
        ),
    ],
)
def test_other_grammars(engine: LocalEngine, grammar: Grammar, pattern: str) -> None:
    for seed in range(6):
        (result,) = engine.generate([PROMPT], following(grammar, seed=seed, temperature=2.0))
        if result.finish_reason is FinishReason.STOP:
            assert re.fullmatch(pattern, text_of(result.token_ids))
        else:
            assert len(result.token_ids) == 80


def test_the_choice_ends_with_the_grammar_and_needs_no_eos(engine: LocalEngine) -> None:
    (result,) = engine.generate([PROMPT], following(choice("merry"), max_tokens=80))
    assert text_of(result.token_ids) == "merry"
    assert result.finish_reason is FinishReason.STOP
    assert engine.config.eos_token_ids[0] not in result.token_ids


def test_max_tokens_cuts_a_grammar(engine: LocalEngine) -> None:
    (result,) = engine.generate([PROMPT], following(JSON, max_tokens=3))
    assert result.finish_reason is FinishReason.LENGTH
    assert len(result.token_ids) == 3


def test_a_request_without_output_computes_no_masks(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would wait for the mask, during whose computation the parser cannot be read."""
    prepared: list[GrammarState] = []
    monkeypatch.setattr(GrammarState, "prepare", lambda state, pool: prepared.append(state))
    (found,) = engine.generate([PROMPT], following(regex("a+"), max_tokens=0))
    assert (found.token_ids, prepared) == ((), [])


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 60}])
def test_an_end_that_must_not_be_waits_until_the_grammar_is_complete(
    engine: LocalEngine, params: dict[str, object]
) -> None:
    """``[a-z]{1,20}`` accepts from the first letter on, and is complete after twenty."""
    for seed in range(4):
        wanted = following(regex("[a-z]{1,20}"), seed=seed, **params)
        (result,) = engine.generate([PROMPT], wanted)
        assert re.fullmatch("[a-z]{20}", text_of(result.token_ids))
        assert result.finish_reason is FinishReason.STOP


def test_an_empty_text_ends_at_once(engine: LocalEngine) -> None:
    for params in ({}, {"ignore_eos": True, "min_tokens": 5}, {"allowed_token_ids": (7,)}):
        (result,) = engine.generate([PROMPT], following(choice(""), **params))
        assert text_of(result.token_ids) == ""
        assert result.finish_reason is FinishReason.STOP


def test_a_row_without_an_allowed_token_fails_by_name_and_alone(engine: LocalEngine) -> None:
    (letter,) = TOKENIZER.encode("q")
    free = SamplingParams(max_tokens=6, temperature=0.0)
    alone = engine.generate([PROMPT], free)[0].token_ids
    requests = [
        Request(
            request_id="stuck",
            prompt=PROMPT,
            params=following(regex("[a-c]+"), allowed_token_ids=(letter,)),
        ),
        Request(request_id="free", prompt=PROMPT, params=free),
    ]
    outputs = engine.run(requests)
    (failed,) = outputs["stuck", 0]
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error == "no token is allowed at position 0 of the output"
    assert failed.error_code == "invalid_value"
    assert tuple(t for o in outputs["free", 0] for t in o.token_ids) == alone
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_a_grammar_that_becomes_too_complex_fails_by_name(engine: LocalEngine) -> None:
    """It begins with harmless digits, so it compiles; the states after them are without number."""
    late = r"~/(.|\n)*a(.|\n){18}/ & /(.|\n)*b(.|\n){15}/"
    text = f'start: "123456789 123456789" T\nT: {late}\n'
    params = following(Grammar(kind=GrammarKind.LARK, text=text))
    outputs = engine.run([Request(request_id="r", prompt=PROMPT, params=params)])["r", 0]
    assert len(outputs) > 1
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert outputs[-1].error_code == "invalid_value"
    assert outputs[-1].error_param == "structured_outputs"
    assert "structured_outputs cannot be followed at position" in (outputs[-1].error or "")


MIXED = [
    following(JSON, temperature=1.5, frequency_penalty=0.7, logprobs=2),
    following(JSON, seed=8, repetition_penalty=1.3, presence_penalty=0.4, top_p=0.95),
    following(regex("[a-z ,]{30,50}"), seed=9, bad_words=((74, 81), (9,))),
    following(choice("merry", "sad"), temperature=0.0),
    SamplingParams(max_tokens=30, seed=4, bad_words=((15,), (20, 21)), logprobs=1),
    SamplingParams(max_tokens=30, seed=5, allowed_token_ids=tuple(range(30, 400))),
]


def requests_of(n: int = 1) -> list[Request]:
    prompts = [TOKENIZER.encode(text) for text in ("ROMEO:", "My lord, ", "What is ")]
    return [
        Request(request_id=f"r{i}", prompt=prompts[i % 3] * 3, params=params, n=n)
        for i, params in enumerate(MIXED)
    ]


def exact_engine(**settings: Any) -> LocalEngine:
    """One whose results do not depend on the other requests of a step."""
    section = EngineSection(deterministic="on", **settings.pop("section", {}))
    return LocalEngine(DEMO, dtype="float32", section=section, max_model_len=128, **settings)


Results = dict[tuple[str, int], tuple[Any, ...]]


def results_of(outputs: dict[tuple[str, int], list[TokenOutput]]) -> Results:
    """Tokens, logprobs bit for bit, and the end of each choice."""
    return {
        key: (
            tuple(t for o in found for t in o.token_ids),
            tuple(p for o in found for p in o.logprobs),
            found[-1].finish_reason,
        )
        for key, found in outputs.items()
    }


@pytest.fixture(scope="module")
def calm() -> Results:
    """Every choice of the mixed requests, undisturbed."""
    return results_of(exact_engine().run(requests_of(n=2)))


def test_steps_that_are_run_again_change_nothing(calm: Results) -> None:
    section = {"max_num_batched_tokens": 24, "max_num_seqs": 16}
    engine = exact_engine(section=section, wrap=FailingDispatcher)
    failing = engine.dispatcher
    assert isinstance(failing, FailingDispatcher)
    rng = random.Random(5)
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    for request in requests_of(n=2):
        engine.add_request(request)
        outputs |= {(request.request_id, c): [] for c in range(2)}
    while engine.engine.has_work:
        failing.fail_at = rng.choice((None, *range(8)))
        try:
            for output in engine.step():
                outputs[output.request_id, output.choice].append(output)
        except PeerLostError:
            pass
        engine.engine.check_integrity()
    assert failing.num_failures > 20
    assert results_of(outputs) == calm


def test_preemption_changes_nothing(calm: Results) -> None:
    each = block_bytes(LocalEngine(DEMO).config, 4, torch.float32)
    section = {"block_size_tokens": 4, "max_num_seqs": 12, "kv_cache_bytes": each * 34}
    engine = exact_engine(section=section)
    assert results_of(engine.run(requests_of(n=2))) == calm
    assert engine.engine.stats()["num_preemptions_total"] > 3


def test_a_request_goes_on_elsewhere_from_its_output_so_far(calm: Results) -> None:
    """Cut at random places and resubmitted, tokens and ends are the same."""
    engine = exact_engine()
    rng = random.Random(6)
    for request in requests_of():
        tokens, logprobs, reason = calm[request.request_id, 0]
        for _ in range(3):
            cut = rng.randint(0, len(tokens))
            again = replace(request, output_so_far=(tokens[:cut],), attempt=1)
            found = engine.run([again])[request.request_id, 0]
            assert tokens[:cut] + tuple(t for o in found for t in o.token_ids) == tokens
            assert tuple(p for o in found for p in o.logprobs) == logprobs[cut:]
            assert found[-1].finish_reason is reason
