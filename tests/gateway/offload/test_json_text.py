"""JSON texts are counted before they are parsed, and parsed so that other threads run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cluster.core.errors import RequestError
from gateway.offload import json_text
from gateway.offload.json_text import (
    MAX_ENTRIES,
    MAX_ESCAPES,
    MAX_NAMES,
    MAX_VALUES,
    check_writable,
    load_json,
)


def many(item: str, count: int) -> str:
    return "[" + ",".join([item] * count) + "]"


def named(count: int) -> str:
    return "{" + ",".join(f'"{place}":0' for place in range(count)) + "}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (many("[]", MAX_VALUES), f"has {MAX_VALUES + 1} strings, lists and objects"),
        (many("{}", MAX_VALUES), f"has {MAX_VALUES + 1} strings, lists and objects"),
        (many('""', MAX_VALUES), f"has {MAX_VALUES + 1} strings, lists and objects"),
        (many('{"a":"b"}', MAX_VALUES // 3 + 1), "strings, lists and objects"),
        (named(MAX_NAMES + 1), f"has {MAX_NAMES + 1} names of objects"),
        (many("1", MAX_ENTRIES + 2), f"has {MAX_ENTRIES + 1} entries"),
        (json.dumps("\n" * (MAX_ESCAPES + 1)), f"has {MAX_ESCAPES + 1} escapes"),
        (json.dumps(["\\" * MAX_ESCAPES, '"']), f"has {MAX_ESCAPES + 1} escapes"),
        (json.dumps({"a": many('"\\"', 1)}) + many("[]", MAX_VALUES), "strings, lists and objects"),
    ],
)
def test_too_much_is_refused_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(json, "loads", lambda *text, **more: calls.append(text[0]))
    with pytest.raises(RequestError, match=words) as caught:
        load_json(text, "body")
    assert (caught.value.param, calls) == ("body", [])
    assert "are allowed" in caught.value.message


@pytest.mark.parametrize(
    "value",
    [
        [[]] * (MAX_VALUES - 3),
        {str(place): 0 for place in range(MAX_NAMES)},
        [1] * MAX_ENTRIES,
        "\n\\" * (MAX_ESCAPES // 2),
        "[]{},:" * 300_000,
        '\\"' * 300_000 + "[" * 300_000,
        ["\\" * place + "[,]" for place in range(2000)],
        "\u8a9e\U0001f600," * 300_000,
        [1.5, -2e300, 10**300, 0],
    ],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_the_same_value_is_read(value: Any, is_ascii: bool) -> None:
    """Strings are not counted by what is in them, wherever the pieces of the count end."""
    text = json.dumps([value, " " * 20_000], ensure_ascii=is_ascii)
    assert load_json(text, "body")[0] == value


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_of_any_size_count_the_same(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(json_text, "_PIECE_CHARS", size)
    monkeypatch.setattr(json_text, "_SHORT_CHARS", 0)
    text = json.dumps({'a\\"[': ["\\", '\\"', "],{", {"b": [1, 2, 3]}], "c": "\\\\"})
    for limit, most in (("MAX_NAMES", 3), ("MAX_VALUES", 11), ("MAX_ENTRIES", 6)):
        with monkeypatch.context() as changed:
            changed.setattr(json_text, limit, most)
            assert load_json(text, "x") == json.loads(text)
            changed.setattr(json_text, limit, most - 1)
            with pytest.raises(RequestError, match=f"x has {most} "):
                load_json(text, "x")


def test_other_threads_run_between_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter may change threads at each call of a Python function."""
    calls: list[str] = []
    monkeypatch.setattr(json_text, "_integer", calls.append)
    monkeypatch.setattr(json_text, "_number", calls.append)
    load_json(many("12", 20_000), "body")
    load_json(many("1.5", 20_000), "body")
    assert len(calls) == 40_000


@pytest.mark.parametrize("value", [math.inf, [math.nan], {"a": [{"b": -math.inf}]}])
def test_what_is_no_number_cannot_be_written(value: object) -> None:
    with pytest.raises(ValueError, match="not finite"):
        check_writable(value)


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 1}, [{"a": "b\ud83d"}]])
def test_half_a_character_cannot_be_written(value: object) -> None:
    with pytest.raises(UnicodeEncodeError):
        check_writable(value)
