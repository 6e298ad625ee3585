"""Long lists are checked in slices, with the same result."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.core.errors import RequestError
from gateway.core import bodies
from gateway.core.bodies import MAX_SLICE
from gateway.http.parse import parse_body
from gateway.http.pooling import InspectBody
from gateway.http.schema import ChatBody, CompletionBody
from gateway.responses.schema import ResponseBody

LONG = 2 * MAX_SLICE + 100


def test_no_call_checks_more_than_a_slice() -> None:
    sizes: list[int] = []

    def check(items: Any) -> Any:
        sizes.append(len(items))
        return items

    assert bodies._validate_slices(list(range(LONG)), check) == list(range(LONG))
    assert sizes == [MAX_SLICE, MAX_SLICE, 100]


SAID = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChatBody, {"messages": [*[SAID] * LONG, {"role": 1}]}, f"messages[{LONG}].role"),
        (
            ChatBody,
            {
                "messages": [
                    SAID,
                    {**SAID, "content": [*[PART] * LONG, {"type": "text", "text": 1}]},
                ]
            },
            "messages[1].content",
        ),
        (
            ResponseBody,
            {"input": [*[SAID] * LONG, {**SAID, "content": [*[PART] * LONG, {"type": 5}]}]},
            f"input[{LONG}].content",
        ),
        (ResponseBody, {"input": [*[SAID] * LONG, {"role": 1}]}, f"input[{LONG}].role"),
        (CompletionBody, {"prompt": [*[1] * LONG, "a"]}, "prompt"),
        (CompletionBody, {"prompt": "a", "stop_token_ids": [1] * LONG + ["a"]}, None),
    ],
)
def test_errors_name_the_item(kind: type[Any], body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(kind, body)
    assert caught.value.param == (param or f"stop_token_ids[{LONG}]")


@pytest.mark.parametrize("prompt", [[1] * LONG, [[1] * LONG, [2]], ["a"] * LONG, [[1]] * LONG])
def test_long_lists_keep_their_values(prompt: list[Any]) -> None:
    assert parse_body(CompletionBody, {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("labels", [[1] * LONG, [0.5] * LONG, [[1, 2]] * LONG, [[0.5] * LONG]])
def test_unions_of_long_lists_keep_their_types(labels: list[Any]) -> None:
    found = parse_body(InspectBody, {"token_ids": [1], "outputs": [], "labels": labels}).labels
    assert found == labels
    assert repr(found) == repr(labels)
