"""Reads a stream of a response as a strict client does."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.gateway.stack import Stack

PATH = "/v1/responses"
ENDS = ("response.completed", "response.incomplete", "response.failed")
_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
_VOLATILE = re.compile(r"(resp|msg|rs|fc|ctc|call)_[0-9a-f]+")
_TIMES = ("created_at", "completed_at")
Event = dict[str, Any]


def respond(stack: Stack, **body: Any) -> dict[str, Any]:
    """The response of a request that must succeed; it is what openai-python knows."""
    answer = stack.http.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    OpenAIResponse.model_validate(found)
    return found


def stream(stack: Stack, **body: Any) -> list[Event]:
    """The events of a stream, which must end well."""
    with stack.http.stream("POST", PATH, json={**body, "stream": True}) as answer:
        answer.read()
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = parse(answer.text)
    assert events[-1]["type"] in ENDS[:2]
    check_order(events)
    return events


def parse(text: str) -> list[Event]:
    """The events; ``[DONE]`` must be last, and each must be what openai-python knows."""
    *blocks, done, empty = text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    events = []
    for block in blocks:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("error", "response.failed"):  # their codes are more than OpenAI's
            _EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def check_order(events: list[Event]) -> None:
    """The deltas are those of the items, and the items those of the response."""
    first, second, *middle, last = events
    assert (first["type"], second["type"]) == ("response.created", "response.in_progress")
    for event in (first, second):
        assert (event["response"]["status"], event["response"]["output"]) == ("in_progress", [])
    items: list[Event] = []
    texts: dict[tuple[str, str], str] = {}
    logprobs: list[Any] = []
    for event in middle:
        kind = event["type"]
        if "output_index" in event and kind != "response.output_item.added":
            assert event["output_index"] == len(items) - 1
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items)
            assert not items or items[-1]["status"] != "in_progress"
            items.append(copy.deepcopy(event["item"]))
            assert items[-1]["status"] == "in_progress"
        elif kind == "response.content_part.added":
            assert event["item_id"] == items[-1]["id"]
            assert items[-1]["content"] == []
            items[-1]["content"].append(event["part"])
        elif kind.endswith(".delta"):
            assert event["delta"]
            key = event["item_id"], kind.removesuffix(".delta")
            texts[key] = texts.get(key, "") + event["delta"]
            logprobs += event.get("logprobs", [])
        elif kind == "response.content_part.done":
            items[-1]["content"][event["content_index"]] = event["part"]
        elif kind == "response.output_item.done":
            if "content" in items[-1]:
                assert event["item"]["content"] == items[-1]["content"]
            items[-1] = event["item"]
        else:
            value = next(event[name] for name in ("text", "arguments", "input") if name in event)
            assert texts.pop((event["item_id"], kind.removesuffix(".done")), "") == value
            assert event.get("logprobs", []) == logprobs
            logprobs = []
    assert texts == {}
    assert last["response"]["output"] == items
    assert last["type"] == f"response.{last['response']['status']}"
    assert last["response"]["id"] == first["response"]["id"]


def without_names(response: dict[str, Any]) -> dict[str, Any]:
    """A response without its times, ids, and whether it was streamed."""
    plain = {name: value for name, value in response.items() if name not in _TIMES}
    text = _VOLATILE.sub(lambda found: f"{found[1]}_", json.dumps(plain))
    found: dict[str, Any] = json.loads(text)
    return found


def both(stack: Stack, **body: Any) -> dict[str, Any]:
    """The response of a request; the stream of the same request has the same."""
    whole = respond(stack, **body)
    streamed = stream(stack, **body)[-1]["response"]
    assert without_names(streamed) == without_names(whole)
    return whole


def texts_of(response: dict[str, Any]) -> list[tuple[str, str]]:
    """Type and text of each item of the output."""
    return [(item["type"], text_of(item)) for item in response["output"]]


def text_of(item: dict[str, Any]) -> str:
    """The text of an item of any type."""
    if "content" in item:
        return "".join(part["text"] for part in item["content"])
    return str(item.get("arguments", item.get("input", item.get("output"))))
