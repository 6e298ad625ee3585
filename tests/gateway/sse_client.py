"""Reads a stream of server-sent events as a strict client does."""

from __future__ import annotations

import json
from typing import Any

from tests.gateway.stack import Stack


def read_events(stack: Stack, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that must end well; checks the rules that all streams follow."""
    with stack.http.stream("POST", path, json={**fields, "stream": True}) as response:
        response.read()
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    return parse_events(response.text)


def parse_events(text: str) -> list[dict[str, Any]]:
    """The JSON of each event; ``[DONE]`` must be last, comments are left out."""
    blocks = text.split("\n\n")
    assert blocks[-1] == ""
    events = [block for block in blocks[:-1] if not block.startswith(":")]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert all(chunk != "[DONE]" for chunk in chunks)
    return chunks


def by_choice(chunks: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The entries of each choice, in order; exactly one of each ends it, and it is the last."""
    choices: dict[int, list[dict[str, Any]]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            choices.setdefault(choice["index"], []).append(choice)
    for entries in choices.values():
        ends = [entry["finish_reason"] for entry in entries]
        assert ends[-1] is not None
        assert all(end is None for end in ends[:-1])
    return choices
